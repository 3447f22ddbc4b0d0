"""Traces of balanced requests on the console: one CLIENT span per attempt, all in the trace of the caller.

    python examples/opentelemetry_console.py

pathlb speaks the OpenTelemetry API and nothing else: set up the SDK as for any program and there is no more to do.
"""

import asyncio

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

import pathlb
from pathlb.testing import Fleet


def one_line(span: ReadableSpan) -> str:
    """The exporter prints a page of JSON per span by default."""
    attributes = " ".join(f"{name}={value!r}" for name, value in sorted((span.attributes or {}).items()))
    trace_id = span.context.trace_id if span.context else 0
    return f"{trace_id:032x} {span.kind.name} {span.name!r} {attributes}\n"


async def main(fleet: Fleet) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=one_line)))
    trace.set_tracer_provider(provider)
    tracer = trace.get_tracer("example")

    fleet[0].kill()
    async with pathlb.AsyncClient(fleet.urls, base_url="http://path-gateway") as client:
        with tracer.start_as_current_span("serving my caller"):
            # The other two are passed over while the dead one is eligible: so the first attempt fails here.
            response = await client.get("/v1/status", extensions={"pathlb": {"avoid": fleet.urls[1:]}})
            print("status", response.status_code)
    provider.shutdown()


if __name__ == "__main__":
    with Fleet(3) as fleet:
        asyncio.run(main(fleet))
