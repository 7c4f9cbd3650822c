"""A service that draws: HTTP in front, a queue, and one worker that keeps the model in memory.

    pip install fastapi uvicorn
    python examples/drawing_service.py demo --port 8000

    curl -d '{"count": 4, "label": "ship", "seed": 1}' -H 'content-type: application/json' localhost:8000/drawings
    curl localhost:8000/drawings/ID                      # "waiting", "drawing", "done", "stopped" or "failed"
    curl localhost:8000/drawings/ID/picture -o ships.png
    curl -X DELETE localhost:8000/drawings/ID            # stops it, and forgets its picture

Requests are checked before they wait, wrong ones are answered with one sentence that says what is expected, and neither
the queue nor the finished pictures can outgrow the memory. Everyone who can reach the port may draw.
"""

from __future__ import annotations

import argparse
import logging
import queue
import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from tamingfast import Net2NetTransformer, UserError, load_model, tasks

logger = logging.getLogger("drawing service")


class Wanted(BaseModel):
    """The body of a request; what is left out is the model's own."""

    model_config = ConfigDict(extra="forbid")

    count: Annotated[int, Field(ge=1)] = 1
    label: int | str | None = None
    height: Annotated[int, Field(ge=1)] | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = 100
    schedule: str = "strided"

    def options(self, model: Net2NetTransformer) -> tasks.DrawingOptions:
        given = self.model_dump(include={"seed", "temperature", "top_k"}, exclude_unset=True)
        return tasks.drawing_options(model, schedule=self.schedule, **given)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, how many may wait, and how many pictures are kept, the latest ones."""

    images: int = 16
    pixels: int = 1 << 20
    waiting: int = 8
    kept: int = 64


@dataclass(eq=False)
class Job:
    """A drawing that was asked for. ``stop`` ends it after its next tokens."""

    wanted: Wanted
    size: tuple[int, int]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: Literal["waiting", "drawing", "done", "stopped", "failed"] = "waiting"
    error: str | None = None
    picture: bytes | None = None
    stop: threading.Event = field(default_factory=threading.Event)


class Busy(Exception):
    """The queue is full."""


class Studio:
    """The model, the queue and the worker, which draws one job after the other: a drawing takes all cores."""

    def __init__(self, model: str, limits: Limits) -> None:
        self.model, self.limits = load_model(model), limits
        self.jobs: dict[str, Job] = {}
        self._queue: queue.Queue[Job | None] = queue.Queue()
        self._lock = threading.Lock()
        self._worker = threading.Thread(target=self._work, name="worker")
        self._worker.start()

    def add(self, wanted: Wanted) -> Job:
        """Check a request and let it wait; raises UserError for what cannot be drawn, and Busy."""
        size = self._checked(wanted)
        with self._lock:
            if sum(job.state == "waiting" for job in self.jobs.values()) >= self.limits.waiting:
                raise Busy
            ended = [job.id for job in self.jobs.values() if job.state not in ("waiting", "drawing")]
            for old in ended[: max(0, len(ended) - self.limits.kept + 1)]:
                del self.jobs[old]
            job = Job(wanted, size)
            self.jobs[job.id] = job
        self._queue.put(job)
        return job

    def before(self, job: Job) -> int:
        """How many others are drawn first."""
        ahead = list(self.jobs.values())
        return sum(other.state in ("waiting", "drawing") for other in ahead[: ahead.index(job)])

    def forget(self, job: Job) -> None:
        job.stop.set()
        with self._lock:
            self.jobs.pop(job.id, None)

    def close(self) -> None:
        """Stop the drawing at hand, leave those that wait, and end the worker."""
        for job in list(self.jobs.values()):
            job.stop.set()
        self._queue.put(None)
        self._worker.join()

    def _checked(self, wanted: Wanted) -> tuple[int, int]:
        own = tasks.image_size(self.model)
        size = tasks.image_size(self.model, (wanted.height or own[0], wanted.width or own[1]))
        if wanted.count > self.limits.images:
            raise UserError(f"count: got {wanted.count}, expected at most {self.limits.images}")
        if wanted.count * size[0] * size[1] > self.limits.pixels:
            raise UserError(
                f"height, width: got {wanted.count} x {size[0]} x {size[1]} pixels, expected at most "
                f"{self.limits.pixels} in all; ask for fewer or smaller images"
            )
        if wanted.label is not None:
            tasks.labels_of(self.model, wanted.label)
        wanted.options(self.model)  # raises for what is out of range
        return size

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if job.stop.is_set():
                job.state = "stopped"
                continue
            job.state = "drawing"
            try:
                job.picture = self._drawn(job)
                job.state = "stopped" if job.stop.is_set() else "done"
            except UserError as error:
                job.error, job.state = str(error), "failed"
            except Exception:  # the worker goes on with the next; the details are for the log alone
                logger.exception("drawing %s", job.id)
                job.error, job.state = "the drawing failed; the operator finds the reason in the log", "failed"

    def _drawn(self, job: Job) -> bytes:
        wanted = job.wanted
        drawing = tasks.sample(
            self.model,
            wanted.count,
            size=job.size,
            label=wanted.label,
            options=wanted.options(self.model),
            stop=job.stop.is_set,
        )
        with TemporaryDirectory() as folder:  # `save` keeps in the picture how it was made
            (file,) = drawing.save(Path(folder, "drawing.png"))
            return file.read_bytes()


def service(model: str, limits: Limits = Limits()) -> FastAPI:
    """The application; the model is read when it starts."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        app.state.studio = studio = Studio(model, limits)
        yield
        studio.close()

    app = FastAPI(title="tamingfast", lifespan=running)

    def found(request: Request, id: str) -> Job:
        job = request.app.state.studio.jobs.get(id)
        if job is None:
            raise LookupError(f"id: got {id[:40]!r}, expected that of a drawing; the oldest are forgotten")
        return job

    @app.post("/drawings", status_code=202)
    def ask(request: Request, wanted: Wanted) -> dict[str, Any]:
        return described(request, request.app.state.studio.add(wanted))

    @app.get("/drawings/{id}")
    def look(request: Request, id: str) -> dict[str, Any]:
        return described(request, found(request, id))

    @app.get("/drawings/{id}/picture")
    def picture(request: Request, id: str) -> Response:
        job = found(request, id)
        if job.state == "done":
            return Response(job.picture, media_type="image/png")
        return refused(409, job.error or f"picture: got a drawing that is {job.state}, expected one that is done")

    @app.delete("/drawings/{id}", status_code=204)
    def forget(request: Request, id: str) -> None:
        request.app.state.studio.forget(found(request, id))

    def described(request: Request, job: Job) -> dict[str, Any]:
        said: dict[str, Any] = {"id": job.id, "state": job.state}
        if job.state == "waiting":
            said["before"] = request.app.state.studio.before(job)
        return said | ({"error": job.error} if job.error else {})

    app.add_exception_handler(UserError, lambda request, error: refused(422, str(error)))
    app.add_exception_handler(LookupError, lambda request, error: refused(404, str(error)))
    app.add_exception_handler(Busy, lambda request, error: refused(503, "too many drawings wait; ask again later"))
    app.add_exception_handler(RequestValidationError, lambda request, error: refused(422, sentence(error)))
    return app


def refused(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status, {"Retry-After": "10"} if status == 503 else None)


def sentence(error: Any) -> str:
    """The first mistake in a body, as `tamingfast` words those in its own arguments."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:]) or "body"
    return f"{name}: got {str(first['input'])[:60]!r}, expected otherwise: {first['msg'].lower()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="a prior: a run, a checkpoint or a name")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; by default this machine's own")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run(service(options.model), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
