"""PyTorch's layers in plain NumPy, on NHWC images and with weights in PyTorch's layout, for tests to compare with."""

import math

import numpy as np

erf = np.vectorize(math.erf)


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, weight, bias, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def batch_norm(x, weight, bias, mean, var, eps=1e-5):
    return (x - mean) / np.sqrt(var + eps) * weight + bias


def conv2d(x, weight, bias=0.0, *, stride=1, padding=0):
    """`nn.Conv2d`, tap by tap; weight [O, I, kh, kw]."""
    _, _, rows, columns = weight.shape
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    sides = [(x.shape[axis] - taps) // stride + 1 for axis, taps in ((1, rows), (2, columns))]
    out = np.zeros((x.shape[0], *sides, weight.shape[0])) + bias
    for row, column in np.ndindex(rows, columns):
        ends = row + stride * (sides[0] - 1) + 1, column + stride * (sides[1] - 1) + 1
        out += x[:, row : ends[0] : stride, column : ends[1] : stride] @ weight[:, :, row, column].T
    return out


def max_pool(x):
    """3 x 3, stride 2, padding 1."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    sides = [(side - 1) // 2 + 1 for side in x.shape[1:3]]
    windows = [
        padded[:, row : row + 2 * sides[0] - 1 : 2, column : column + 2 * sides[1] - 1 : 2]
        for row, column in np.ndindex(3, 3)
    ]
    return np.max(windows, axis=0)


def window_start(at, length, kernel, dilation):
    """The first token of the window of `at` along one axis, and the number of its dilation group's tokens before it."""
    group, inside = at % dilation, at // dilation
    count = (length - group + dilation - 1) // dilation
    start = min(max(inside - kernel // 2, 0), count - kernel)
    return [group + dilation * (start + step) for step in range(kernel)], [start + s - inside for s in range(kernel)]


def neighborhood(query, key, value, rpb, kernel, dilation):
    """Neighborhood attention of [B, H, W, N, D], query by query; rpb [N, 2 k - 1, 2 k - 1]."""
    out = np.zeros_like(value)
    for row, column in np.ndindex(*query.shape[1:3]):
        rows, row_offsets = window_start(row, query.shape[1], kernel, dilation)
        columns, column_offsets = window_start(column, query.shape[2], kernel, dilation)
        seen = np.ix_(range(len(query)), rows, columns)
        logits = np.einsum("bnd,bijnd->bnij", query[:, row, column], key[seen]) * query.shape[-1] ** -0.5
        if rpb is not None:
            logits += rpb[:, np.array(row_offsets)[:, None] + kernel - 1, np.array(column_offsets) + kernel - 1]
        weights = np.exp(logits - logits.max((2, 3), keepdims=True))
        weights /= weights.sum((2, 3), keepdims=True)
        out[:, row, column] = np.einsum("bnij,bijnd->bnd", weights, value[seen])
    return out


def random_state(shapes, seed=0):
    """Random arrays by name; what must be positive is."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        array = 0.4 * rng.standard_normal(shape)
        return 0.5 + np.abs(array) if name.endswith("running_var") else array

    return {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}
