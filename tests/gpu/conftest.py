"""A GPU for each module here; where there is none, two that are played on the CPU."""

from collections.abc import Callable, Iterator

import pytest
import torch

from server.config_file import parse_config
from server.runner.loader import LoadedModels, load_models
from tests.support.pretended_gpus.tensors import Gpus
from tests.support.tiny_models import make_pair

Report = Callable[[str], None]


@pytest.fixture(scope="module", autouse=True)
def gpus() -> Iterator[Gpus | None]:
    """None where they are real."""
    if torch.cuda.is_available():
        yield None
        return
    pytest.importorskip("triton")
    from tests.support.pretended_gpus import pretended_gpus

    with pretended_gpus() as pretended:
        yield pretended


@pytest.fixture(scope="module")
def load(
    gpus: Gpus | None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., LoadedModels]:
    """Loads one pair on a device, or each model on its own, once for each setting."""
    paths = make_pair(tmp_path_factory.mktemp("models"))
    kept: dict[str, LoadedModels] = {}

    def load(*devices: str, report: Report | None = None, **engine: object) -> LoadedModels:
        key = repr((devices, engine))
        if key not in kept:
            models = [
                {"name": f"m{k}", "path": str(path), "device": device, "dtype": "float32"}
                for k, (path, device) in enumerate(zip(paths, (devices * 2)[:2], strict=True))
            ]
            config = {
                "served_model_name": "tiny",
                "models": models,
                "combination": {"method": "contrastive"},
                "engine": {"kv_memory": "64MiB", "max_length": 128, **engine},
            }
            kept[key] = load_models(parse_config(config), report)
        return kept[key]

    return load
