"""`python -m scripts.distill {generate,train,shortlist,plot}`."""

from __future__ import annotations

import argparse

from scripts.distill import generate, plot, shortlist, train

COMMANDS = {"generate": generate, "train": train, "shortlist": shortlist, "plot": plot}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.distill", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
