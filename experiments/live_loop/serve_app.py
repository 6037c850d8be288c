"""What Ray Serve runs: a model whose accelerator is a timer, so that its service time is exact (for Ray's Python)."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any

from ray import serve


def build(args: dict[str, Any]) -> Any:
    """The application: one deployment `name`. `start_s` is what loading takes, `base_s + per_item_s * n` what a batch
    of n takes. An answer says when its batch began and ended, on the machine's monotonic clock."""
    start_s, base_s, per_item_s = (float(args[name]) for name in ("start_s", "base_s", "per_item_s"))

    @serve.deployment(ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=5)
    class Model:
        def __init__(self) -> None:
            time.sleep(start_s)
            self.uri = ""

        def reconfigure(self, config: dict[str, Any]) -> None:
            self.uri = config.get("model_uri", "")
            self.run.set_max_batch_size(int(config.get("max_batch", 1)))
            self.run.set_batch_wait_timeout_s(float(config.get("batch_wait_s", 0.0)))

        @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.0)
        async def run(self, items: list[int]) -> list[tuple[int, float, float]]:
            began = time.monotonic()
            await asyncio.sleep(base_s + per_item_s * len(items))
            return [(len(items), began, time.monotonic())] * len(items)

        async def __call__(self, request: Any) -> str:
            size, began, ended = await self.run(0)
            answer = {
                "batch": size,
                "began": began,
                "ended": ended,
                "model": self.uri,
                "replica": os.getpid(),
            }
            return json.dumps(answer)

    return Model.options(name=args["name"]).bind()
