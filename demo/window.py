"""
OpenCV's window.
"""

import subprocess
import sys

import cv2
import numpy as np

NAME = "oanet_d2"
ESCAPE = 27


def check_display():
    """
    Raises:
        ValueError: no window can be shown.
    """
    # In another process: without a display OpenCV ends the one that asks.
    show = f"import cv2; cv2.namedWindow({NAME!r}); cv2.destroyAllWindows()"
    tried = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True)
    if tried.returncode != 0:
        reason = next((x for x in tried.stderr.splitlines() if "isplay" in x), "").strip()
        raise ValueError(
            "Without --output, results are shown in a window, but OpenCV cannot open one"
            + (f" ({reason})." if reason else ".")
        )


def show(rgb: np.ndarray, wait: bool) -> bool:
    """
    Args:
        rgb: (H, W, 3) uint8.
        wait: for a key.

    Returns:
        False if escape was pressed.
    """
    cv2.namedWindow(NAME, cv2.WINDOW_NORMAL)
    cv2.imshow(NAME, np.ascontiguousarray(rgb[:, :, ::-1]))
    return cv2.waitKey(0 if wait else 1) != ESCAPE
