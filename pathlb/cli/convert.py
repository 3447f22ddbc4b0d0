"""`pathlb convert nginx.conf|traefik.yml`: the TOML of `pathlb serve`, and what did not fit into it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import ConfigError
from ..errors import UsageError

if TYPE_CHECKING:
    from ..converting.draft import Draft

_YAML = (".yml", ".yaml", ".json")
_PARSERS = {"crossplane": "nginx's configuration", "yaml": "YAML"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "What could not be carried over is listed on stderr, with file and line and what to do, and in comments at the "
        "top of the TOML. Exit status: 0 if there is a TOML, 2 if there is none: the file cannot be read or converted, "
        "or --upstream has to say what of it."
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="nginx's (an upstream block, and the proxy_pass to it), or with .yml or .yaml Traefik's: static or "
        "dynamic configuration, or a compose file with traefik.* labels",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write the TOML (default: stdout)")
    parser.add_argument(
        "--upstream", metavar="NAME", help="which upstream or service, where the file has several of them"
    )


def run(options: argparse.Namespace) -> int:
    draft = read(options.file, options.upstream)
    text = draft.render()
    for note in draft.notes:
        print(note, file=sys.stderr)
    if options.output is None:
        sys.stdout.write(text)
        return 0
    try:
        Path(options.output).write_text(text, "utf-8")
    except OSError as exc:
        raise ConfigError(options.output, f"cannot be written: {exc.strerror}") from None
    print(f"wrote {options.output}: pathlb serve --config {options.output}", file=sys.stderr)
    return 0


def read(file: str, upstream: str | None) -> Draft:
    """What a file comes to. Raises `ConfigError`, and `UsageError` without the parser that it takes."""
    suffix = Path(file).suffix.lower()
    if suffix == ".toml":
        raise ConfigError(file, "Traefik's TOML is not read: write it as YAML")
    try:
        if suffix in _YAML:
            from ..converting.traefik import convert
        else:
            from ..converting.nginx import convert
    except ModuleNotFoundError as exc:
        if exc.name not in _PARSERS:
            raise
        package = {"yaml": "pyyaml"}.get(exc.name, exc.name)
        raise UsageError(f"reading {_PARSERS[exc.name]} needs {package}: pip install 'pathlb[convert]'") from None
    return convert(file, upstream)
