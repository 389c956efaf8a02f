"""One inference engine in a process of its own; its text is what is run, so that torch and its threads stay out of it. See :mod:`._engines`.

``python -c TEXT ENGINE MODEL.onnx INPUT.npy OUTPUT.npy THREADS`` loads the model, writes its output for the input, and says so with a line
of JSON. After that each line ``N`` on stdin runs the model N times, and once before to warm up, and is answered with the seconds a call took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy


def onnxruntime_call(path: str, image: Any, threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: image}
    return lambda: session.run(None, feed)[0]


def openvino_call(path: str, image: Any, threads: int) -> Callable[[], Any]:
    import openvino

    # Left to itself it computes in bfloat16 where the CPU can.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(image))

    def call() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    return call


CALLS = {"onnxruntime": onnxruntime_call, "openvino": openvino_call}


def main(engine: str, model: str, image: str, output: str, threads: str) -> None:
    """Serve until stdin ends."""

    def say(**answer: float | str) -> None:
        print(json.dumps(answer), flush=True)

    try:
        call = CALLS[engine](model, numpy.load(image), int(threads))
        numpy.save(output, call())
    except Exception as error:  # whatever an engine does not take; the parent puts it into the report
        say(error=f"{type(error).__name__}: {error}")
        return
    say(cpu=time.process_time())
    for line in sys.stdin:
        call()
        begin = time.perf_counter()
        for _ in range(int(line)):
            call()
        seconds = (time.perf_counter() - begin) / int(line)
        say(seconds=seconds, cpu=time.process_time())


if __name__ == "__main__":
    main(*sys.argv[1:])
