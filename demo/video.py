"""
The demo on videos and webcams.
"""

import logging
import os
from typing import Iterable, Iterator, Optional

import cv2
import numpy as np
from files import check_outputs
from segmenter import Segmenter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from window import show

from detectron2.utils.video_visualizer import VideoVisualizer

from oanet_d2.whole_files import whole_path

EXTENSIONS = (".mp4", ".mkv", ".avi", ".mov")
CODEC = "mp4v"  # which every build of OpenCV with FFmpeg has
logger = logging.getLogger("oanet_d2.demo")


def open_video(path: Optional[str]) -> cv2.VideoCapture:
    """
    Args:
        path: of a video; None: the webcam.

    Raises:
        ValueError: OpenCV cannot read it.
    """
    video = cv2.VideoCapture(0 if path is None else path)
    if not video.grab():
        what = "--webcam: there is none" if path is None else f"--video-input: {path} is no video"
        raise ValueError(f"{what} that OpenCV can read.")
    return video if path is None else cv2.VideoCapture(path)


def plan_video(args) -> Optional[str]:
    """
    Returns:
        the video to write, or None to show it.

    Raises:
        ValueError: it is not possible or there already.
    """
    output = args.output
    if output is None:
        return None
    if os.path.isdir(output) or not output.lower().endswith(EXTENSIONS):
        if os.path.exists(output) and not os.path.isdir(output):
            raise ValueError(f"--output: {output} is a file, and not of {', '.join(EXTENSIONS)}.")
        stem = os.path.splitext(os.path.basename(args.video_input))[0]
        output = os.path.join(output, f"{stem}.mp4")
    check_outputs([output], [args.video_input], args.overwrite)
    return output


def run_on_video(video: cv2.VideoCapture, segmenter: Segmenter, output: Optional[str]):
    """
    Args:
        video: from :func:`open_video`; it is closed at the end.
        output: the video to write; None: it is shown until it ends or escape is pressed.

    Raises:
        OSError: `output` cannot be written.
    """
    total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))  # not positive: of a webcam
    rate = video.get(cv2.CAP_PROP_FPS)
    drawings = tqdm(_drawings(video, segmenter), total=total if total > 0 else None)
    with logging_redirect_tqdm([logging.getLogger("oanet_d2")]):
        if output is None:
            for rgb in drawings:
                if not show(rgb, wait=False):
                    break
            cv2.destroyAllWindows()
        else:
            frames = _write(output, drawings, rate if rate > 0 else 25)
            logger.info(f"{frames} frames in {output}")
            if frames < total:
                logger.warning(f"The video ended after {frames} of the {total} frames it names.")
    video.release()


def _drawings(video: cv2.VideoCapture, segmenter: Segmenter) -> Iterator[np.ndarray]:
    visualizer = VideoVisualizer(segmenter.predictor.metadata)  # an instance keeps its color
    while True:
        success, frame = video.read()
        if not success:
            return
        results = segmenter(frame)
        if len(results) > 1:
            yield segmenter.draw(results)
        else:
            result = results[0]
            yield visualizer.draw_panoptic_seg_predictions(
                frame[:, :, ::-1], result.panoptic_seg, result.segments_info
            ).get_image()


def _write(output: str, drawings: Iterable[np.ndarray], rate: float) -> int:
    """
    Returns:
        the number of frames.
    """
    frames, writer = 0, None
    with whole_path(output) as temporary:
        try:
            for rgb in drawings:
                if writer is None:
                    codec = cv2.VideoWriter_fourcc(*CODEC)
                    writer = cv2.VideoWriter(temporary, codec, rate, rgb.shape[1::-1])
                writer.write(np.ascontiguousarray(rgb[:, :, ::-1]))
                frames += 1
        finally:
            if writer is not None:
                writer.release()
        # OpenCV does not say when a disk is full, but then the file cannot be read.
        if cv2.VideoCapture(temporary).get(cv2.CAP_PROP_FRAME_COUNT) < 1:
            raise OSError(f"OpenCV could not write {frames} frames with the codec {CODEC}")
    return frames
