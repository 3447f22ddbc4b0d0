"""The process of one gateway: settings as the only argument, commands on stdin, answers on stdout, until stdin ends."""

from __future__ import annotations

import json
import sys
from typing import Any

from .commands import decode_settings
from .control import LocalControl, LoopThread


def main() -> None:
    thread = LoopThread()
    control = LocalControl(thread, decode_settings(sys.argv[1]))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(control, line)) + "\n")
        sys.stdout.flush()
    control.close()
    thread.stop()


def _answer(control: LocalControl, line: str) -> dict[str, Any]:
    try:
        return {"result": control.call(json.loads(line))}
    except Exception as exc:
        # Whatever it is, the parent raises it: this process has nobody to tell.
        if isinstance(exc, OSError):
            return {"error": "OSError", "errno": exc.errno, "message": exc.strerror}
        return {"error": type(exc).__name__, "errno": None, "message": str(exc)}


if __name__ == "__main__":
    main()
