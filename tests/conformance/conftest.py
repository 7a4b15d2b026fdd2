from __future__ import annotations

import pytest

from tests.api.conftest import live as live
from tests.conformance.openai_document import OpenAIDocument


@pytest.fixture(scope="session")
def openai_document() -> OpenAIDocument:
    return OpenAIDocument()
