"""Draw a drawing anew, as another artist might: outlined, inked, flat, shaded, bent, or partly missing.

What all drawings of a thing share is its shape and, less so, its colours. A tower that sees every drawing in many
styles learns that, and not the styles of the few artists whose drawings there are.
"""

from __future__ import annotations

import cv2
import numpy as np

HOW_OFTEN = {"flat": 0.12, "inked": 0.08, "plain": 0.03, "outlined": 0.2, "shaded": 0.2, "bent": 0.3, "holed": 0.15}
"""Each independently of the others."""


def restyled(rgb: np.ndarray, opacity: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours (height, width, 3) in 0 to 255 and opacity (height, width) in 0 to 1, float32, in another style."""
    chosen = {style for style, share in HOW_OFTEN.items() if random.random() < share}
    if "flat" in chosen:
        rgb = _flat(rgb, int(random.integers(2, 6)))
    if "inked" in chosen:
        rgb = _inked(rgb, opacity, random)
    if "plain" in chosen:
        rgb = np.broadcast_to(random.uniform(0, 255, 3).astype(np.float32), rgb.shape).copy()
    if "outlined" in chosen:
        rgb = _outlined(rgb, opacity, random)
    if "shaded" in chosen:
        rgb = _shaded(rgb, random)
    if "bent" in chosen:
        rgb, opacity = _bent(rgb, opacity, random)
    if "holed" in chosen:
        opacity = _holed(opacity, random)
    return rgb.clip(0, 255), opacity


def _flat(rgb: np.ndarray, levels: int) -> np.ndarray:
    """Few colours, small details gone."""
    smooth = cv2.medianBlur(rgb.clip(0, 255).astype(np.uint8), 3).astype(np.float32)
    step = 255 / levels
    return (np.floor(smooth / step).clip(0, levels - 1) + 0.5) * step


def _inked(rgb: np.ndarray, opacity: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Dark lines where brightness changes, on paper or on the drawing's mean colour."""
    grey = cv2.GaussianBlur(rgb.mean(-1) * opacity, (0, 0), 1.0)
    change = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    line = (change / max(float(np.percentile(change, 92)), 1e-3)).clip(0, 1)[..., None] ** 1.5
    mean = (rgb * opacity[..., None]).sum((0, 1)) / max(float(opacity.sum()), 1.0)
    paper = mean if random.random() < 0.5 else np.full(3, random.uniform(200, 255))
    ink = random.uniform(0, 60)
    return (paper + (ink - paper) * line).astype(np.float32)


def _outlined(rgb: np.ndarray, opacity: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A line of one colour, mostly dark, along the edge."""
    width = int(random.integers(1, 4))
    padded = cv2.copyMakeBorder(opacity, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    inside = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
    colour = random.uniform(0, 70, 3) if random.random() < 0.8 else random.uniform(0, 255, 3)
    edge = (opacity - inside).clip(0, 1)[..., None]
    return (rgb + (colour - rgb) * edge).astype(np.float32)


def _shaded(rgb: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Lighter towards one side."""
    height, width = rgb.shape[:2]
    angle, strength = random.uniform(0, 2 * np.pi), random.uniform(0.15, 0.5)
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    return (rgb * (1 + strength * (np.cos(angle) * x + np.sin(angle) * y))[..., None]).astype(np.float32)


def _bent(rgb: np.ndarray, opacity: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Moved by a smooth field of a few pixels."""
    height, width = opacity.shape
    field = random.normal(0, random.uniform(1, 3), (4, 4, 2)).astype(np.float32)
    moved = cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
    x = np.arange(width, dtype=np.float32) + moved[..., 0]
    y = np.arange(height, dtype=np.float32)[:, None] + moved[..., 1]
    layers = np.concatenate([rgb * opacity[..., None], opacity[..., None]], axis=-1)
    bent = cv2.remap(layers, x, y, cv2.INTER_LINEAR)
    return bent[..., :3] / np.maximum(bent[..., 3:], 1e-3), bent[..., 3].clip(0, 1)


def _holed(opacity: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A part of it missing, as if something stood before it."""
    height, width = opacity.shape
    h, w = (int(side * random.uniform(0.25, 0.55)) for side in (height, width))
    top, left = int(random.integers(-h // 2, height - h // 2)), int(random.integers(-w // 2, width - w // 2))
    left_out = opacity.copy()
    left_out[max(0, top) : max(0, top + h), max(0, left) : max(0, left + w)] = 0
    return left_out
