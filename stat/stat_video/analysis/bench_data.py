"""`stat-video bench-data`: can the loader keep up with the model, and what does a clip cost?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from pathlib import Path

import torch

from stat_video.data.dataset import ClipDataset, Key, Sample, seed_of
from stat_video.data.loader import collate, make_loader
from stat_video.data.options import DataOptions
from stat_video.data.sources import Source, open_source
from stat_video.devices import available_cpus, prepare_device
from stat_video.errors import UserError, VideoError
from stat_video.evaluate.backend import check_backend
from stat_video.files import write_json
from stat_video.model.building import Config, Model, build_model


@dataclass(frozen=True)
class BenchOptions:
    """How long to measure, and what to compare the loader with.

    Args:
        seconds: time for each of the two measurements of the loader.
        clips: clips that are collated at a time; data.batch_size is not used.
        consumes: clips per second that the model takes, if known; 0 measures it (see steps).
        steps: forward and backward passes on `clips` random clips to measure that; 0 for none.
        device: of these passes: "auto", "cpu", "cuda", ...
        json: file for the figures; empty for none.
    """

    seconds: float = 20.0
    clips: int = 8
    consumes: float = 0.0
    steps: int = 0
    device: str = "auto"
    json: str = ""

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.clips < 1 or self.steps < 0 or self.consumes < 0:
            raise ValueError(
                "bench.seconds must be above 0, bench.clips at least 1, bench.steps and "
                f"bench.consumes at least 0, got {self.seconds}, {self.clips}, {self.steps} "
                f"and {self.consumes}"
            )


@dataclass
class Figures:
    """decode_ms, transform_ms, collate_ms: of a clip in one process, on one thread.

    one_process, loader, model: clips per second; the loader with data.workers processes, the model
    0 if unknown. cores: of this machine.
    """

    decode_ms: float
    transform_ms: float
    collate_ms: float
    one_process: float
    loader: float
    workers: int
    cores: int
    model: float = 0.0

    def describe(self) -> str:
        """The figures as text."""
        parts = {
            "decode": self.decode_ms,
            "transform": self.transform_ms,
            "collate": self.collate_ms,
        }
        total = sum(parts.values())
        lines = [f"{'':12}{'ms a clip':>10}{'share':>8}"]
        lines += [f"{name:12}{ms:10.1f}{100 * ms / total:7.1f}%" for name, ms in parts.items()]
        lines += [
            f"one process on one thread: {self.one_process:.2f} clips/s",
            f"loader, {self.workers} workers on {self.cores} cores: {self.loader:.2f} clips/s",
        ]
        if self.model:
            lines.append(f"model: {self.model:.2f} clips/s")
            lines.append(self._verdict())
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.loader >= self.model:
            return f"the loader gives {self.loader / self.model:.1f} times what the model takes"
        waits = 100 * (1 - self.loader / self.model)
        needed = self.model / self.one_process
        return (
            f"the model would wait for data {waits:.0f} % of the time; about {needed:.0f} workers, "
            "each on a core of its own, would feed it"
        )


def bench_data(data: DataOptions, config: Config, options: BenchOptions) -> Figures:
    """Measure the training loader on `data.train`. Raises UserError when no video can be used."""
    clips = max(options.clips - options.clips % data.repeats, data.repeats)
    source = open_source(
        replace(data, batch_size=clips),
        frames=config.frames,
        image_size=config.image_size,
        split="train",
    )
    names = source.class_names
    fitted = replace(config, num_classes=len(names), class_names=names)
    with _one_thread():  # as in a worker
        decode_ms, transform_ms, collate_ms = _stages(source, clips, options.seconds)
    one_process = 1e3 / (decode_ms + transform_ms + collate_ms)
    figures = Figures(
        decode_ms,
        transform_ms,
        collate_ms,
        one_process,
        loader=_loader_rate(source, options.seconds) if data.workers else one_process,
        workers=data.workers,
        cores=available_cpus(),
        model=options.consumes or _model_rate(fitted, clips, options),
    )
    if options.json:
        record = {**asdict(figures), "data": asdict(data), "config": asdict(config)}
        write_json(Path(options.json), record)
    return figures


def _stages(source: Source, clips: int, seconds: float) -> tuple[float, ...]:
    """Milliseconds per clip in decode, transform and collate."""
    keys = chain.from_iterable(_forever(source))
    _one_batch(source.dataset, keys, clips)  # the first one loads libraries
    batches: list[tuple[float, float, float]] = []
    began = time.perf_counter()
    while not batches or time.perf_counter() - began < seconds:
        batches.append(_one_batch(source.dataset, keys, clips))
    return tuple(1e3 * sum(stage) / (clips * len(batches)) for stage in zip(*batches, strict=True))


def _one_batch(dataset: ClipDataset, keys: Iterator[Key], clips: int) -> tuple[float, float, float]:
    """Seconds in decode, transform and collate of a batch."""
    samples: list[Sample] = []
    views, unusable = range(dataset.clips_a_video), 0
    decode = transform = 0.0
    while len(samples) * len(views) < clips:
        epoch, index, *_ = next(keys)
        start = time.perf_counter()
        try:
            images = dataset.read(index, seed_of(dataset.seed, epoch, index), views)
        except VideoError as error:
            unusable += 1
            if unusable > len(dataset):
                raise UserError(f"no video of the list can be used: {error}") from error
            continue
        read = time.perf_counter()
        tensors = dataset.augment(images, (dataset.seed, epoch, index), views)
        decode, transform = decode + read - start, transform + time.perf_counter() - read
        samples.append(Sample(tensors, tuple(views), 0, index))
    start = time.perf_counter()
    collate(samples)
    return decode, transform, time.perf_counter() - start


def _forever(source: Source) -> Iterator[list[Key]]:
    """Endless lists of keys, epoch after epoch."""
    for epoch in count():
        source.batches.set_position(epoch)
        yield from source.batches


def _loader_rate(source: Source, seconds: float) -> float:
    """Clips per second from the loader once all workers are busy.

    Epochs follow one another without a break; otherwise a short list would never fill the workers.
    """
    workers, skips, clips = source.options.workers, source.new_skip_count(), 0
    batches = iter(make_loader(source.dataset, _forever(source), workers))
    for batch in islice(batches, 2 * workers + 1):  # what is made before it is asked for
        skips.update(batch)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        batch = next(batches)
        skips.update(batch)
        clips += len(batch.labels)
    return clips / (time.perf_counter() - began)


def _model_rate(config: Config, clips: int, options: BenchOptions) -> float:
    """Clips per second through forward and backward on random clips; 0 if not requested."""
    if not options.steps:
        return 0.0
    device = prepare_device(options.device)
    model = build_model(config)
    check_backend(model, device)
    model.to(device).train()
    size = config.in_channels, config.frames, config.image_size, config.image_size
    batch = torch.randn(clips, *size, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        _step(model, batch)  # the first one compiles and allocates
        began = time.perf_counter()
        for _ in range(options.steps):
            _step(model, batch)
    return clips * options.steps / (time.perf_counter() - began)


def _step(model: Model, batch: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(batch).float().sum().backward()
    if batch.is_cuda:
        torch.cuda.synchronize()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
