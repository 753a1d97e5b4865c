"""What several tests measure by hand."""

import numpy as np


def pairwise_iou(masks):
    """Mean IoU of all pairs of raters where both drew, of `(N, H, W, R)` masks."""
    ious = []
    for i in range(masks.shape[-1]):
        for j in range(i):
            a, b = masks[..., i] > 0, masks[..., j] > 0
            both = a.any(axis=(1, 2)) & b.any(axis=(1, 2))
            ious.append(((a & b).sum(axis=(1, 2)) / np.maximum((a | b).sum(axis=(1, 2)), 1))[both])
    return np.concatenate(ious).mean()
