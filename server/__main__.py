"""cos-server: serve, check, bench, top.

Exit codes: 0 done or drained, 1 the engine has failed, 2 bad arguments, configuration or models.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from server import __version__, logs
from server.config import ServerConfig
from server.config_file import load_config
from server.errors import CosError

logger = logging.getLogger("server")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; anything the project raises on purpose becomes one line and code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser(arguments).parse_args(arguments)
    logs.configure(options.log_level, options.log_format)
    try:
        code: int = options.run(options)
    except CosError as error:
        sys.stderr.write(f"cos-server: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cos-server", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"cos-server {__version__}")
    _add_logging(parser)
    parser.set_defaults(log_level="info", log_format="text")
    # The same behind the command; only what is given there counts.
    logging_options = argparse.ArgumentParser(add_help=False)
    _add_logging(logging_options)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_command = partial(commands.add_parser, parents=[logging_options])
    serve = add_command("serve", help="serve the configured models over HTTP")
    _add_config(serve)
    serve.add_argument("--host", help="address to listen on, instead of http.host")
    serve.add_argument("--port", type=int, help="port to listen on, instead of http.port")
    serve.set_defaults(run=_serve)
    check = add_command("check", help="validate a configuration")
    _add_config(check)
    check.add_argument("--load", action="store_true", help="load the models, too")
    check.set_defaults(run=_check)
    bench = add_command("bench", help="measure a running server")
    if "bench" in arguments:
        _add_bench(bench)
    top = add_command("top", help="watch a running server in the terminal")
    if "top" in arguments:
        _add_top(top)
    return parser


def _add_logging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        default=argparse.SUPPRESS,
        help="least level to log (default info)",
    )
    parser.add_argument(
        "--log-format",
        choices=["text", "json"],
        default=argparse.SUPPRESS,
        help="lines of text, or one JSON object a line (default text)",
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="a configs/*.yaml")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one entry, as in decoding.gamma=6; may be repeated",
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    # Here, so that the other commands do not pay for importing it.
    from server.bench import cli

    cli.add_arguments(parser)
    parser.set_defaults(run=cli.run)


def _add_top(parser: argparse.ArgumentParser) -> None:
    # Here, too.
    from server.top import cli

    cli.add_arguments(parser)
    parser.set_defaults(run=cli.run)


def _load_config(options: argparse.Namespace) -> ServerConfig:
    overrides = list(options.overrides)
    for key in ("host", "port"):
        if (value := getattr(options, key, None)) is not None:
            # An IPv6 address is other things to YAML.
            overrides.append(f"http.{key}={json.dumps(value)}")
    return load_config(options.config, overrides)


def _serve(options: argparse.Namespace) -> int:
    # Until uvicorn takes signals itself: one that nobody takes is lost in a container, whose first
    # process this is.
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        config = _load_config(options)
        logger.info("starting %s from %s", config.served_model_name, options.config)
        # Here, because torch and transformers take seconds to import.
        from server.serve import finish, serve

        return finish(serve(config))
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> None:
    """Nothing is served yet; at once, for what is being imported would swallow an exception."""
    logging.shutdown()
    os._exit(0)


def _check(options: argparse.Namespace) -> int:
    config = _load_config(options)
    from server.app import create_app, load_parts
    from server.metrics import Metrics
    from server.serve import check_tls

    check_tls(config.http)
    create_app(config)
    if options.load:
        load_parts(config, Metrics(config))
    sys.stdout.write(f"{options.config}: ok\n")
    return 0


_DESCRIPTION = "OpenAI-compatible server for collaborative decoding via speculation."

if __name__ == "__main__":
    sys.exit(main())
