"""JSON-RPC over HTTP: what each method allows, and what is done around the road for requests that ask for it."""

from __future__ import annotations

from .config import JSONRPC as JSONRPC
from .layer import JSONRPCLayer as JSONRPCLayer
from .methods import DEFAULT_METHODS as DEFAULT_METHODS
from .methods import MethodRules as MethodRules
from .methods import Safety as Safety
