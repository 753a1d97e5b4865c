"""Deterministic networks: ResNet-18, U-Net, and the paper's variant of each.

Nothing here is Bayesian: these are the stock Keras models of step 1. Three habits make the later steps easy:

- every layer has a stable name, so masks and checkpoints are keyed by it;
- outputs are probabilities, computed in float32 whatever the dtype policy;
- every initialiser has its own seed, derived from the model's seed and the layer's name, so one seed gives
  the same weights whatever was built before.
"""

import zlib
from collections.abc import Callable
from typing import Any

import keras

__all__ = ["NETWORKS", "build"]

# PyTorch's batch norm, as in torchvision and the paper's code; Keras's own defaults are 0.99 and 1e-3.
BATCH_NORM = {"momentum": 0.9, "epsilon": 1e-5}


def _check_sizes(input_shape, num_outputs):
    if len(input_shape) != 3 or input_shape[-1] is None:
        raise ValueError(f"Expected input_shape=(height, width, channels). Received: input_shape={input_shape}")
    if not isinstance(num_outputs, int) or num_outputs < 1:
        raise ValueError(f"Expected num_outputs, an integer >= 1. Received: num_outputs={num_outputs}")


def layer_seed(seed: int | None, name: str) -> int | None:
    """The seed of a layer, from the model's and the layer's name."""
    most = 0x7FFFFFFF if keras.backend.backend() == "torch" else 0xFFFFFFFF  # torch has no unsigned seeds
    return None if seed is None else zlib.crc32(f"{seed}/{name}".encode()) & most


def _conv(x, filters, kernel_size, name, seed, stride=1, use_bias=False):
    if stride > 1 and kernel_size > 1:
        # Keras pads a strided "same" convolution on one side only; ResNet (and PyTorch) on both.
        x = keras.layers.ZeroPadding2D(kernel_size // 2, name=f"{name}_pad")(x)
    return keras.layers.Conv2D(
        filters,
        kernel_size,
        strides=stride,
        padding="valid" if stride > 1 else "same",
        use_bias=use_bias,
        kernel_initializer=keras.initializers.HeNormal(seed=layer_seed(seed, name)),
        name=name,
    )(x)


def _batch_norm(x, name):
    return keras.layers.BatchNormalization(name=name, **BATCH_NORM)(x)


def _relu(x, name):
    return keras.layers.ReLU(name=name)(x)


def _dense(x, units, name, seed, **options):
    initializer = keras.initializers.GlorotUniform(seed=layer_seed(seed, name))
    return keras.layers.Dense(units, kernel_initializer=initializer, name=name, **options)(x)


def _stem(x, width, stem, seed, use_bias=False):
    x = _conv(x, width, stem, "stem_conv", seed, stride=2 if stem == 7 else 1, use_bias=use_bias)
    x = _relu(_batch_norm(x, "stem_bn"), "stem_relu")
    if stem == 7:
        x = keras.layers.ZeroPadding2D(1, name="stem_pool_pad")(x)  # after a ReLU, 0 is as good as -inf
        x = keras.layers.MaxPooling2D(3, strides=2, name="stem_pool")(x)
    return x


def _basic_block(x, width, stride, name, seed):
    shortcut = x
    x = _conv(x, width, 3, f"{name}_conv1", seed, stride=stride)
    x = _relu(_batch_norm(x, f"{name}_bn1"), f"{name}_relu1")
    x = _conv(x, width, 3, f"{name}_conv2", seed)
    x = _batch_norm(x, f"{name}_bn2")
    if stride > 1 or shortcut.shape[-1] != width:
        shortcut = _conv(shortcut, width, 1, f"{name}_shortcut_conv", seed, stride=stride)
        shortcut = _batch_norm(shortcut, f"{name}_shortcut_bn")
    return _relu(keras.layers.Add(name=f"{name}_add")([x, shortcut]), f"{name}_relu2")


def resnet18(
    input_shape: tuple[int | None, int | None, int],
    num_outputs: int,
    activation: str = "sigmoid",
    stem: int = 3,
    width: int = 64,
    seed: int | None = None,
    name: str = "resnet18",
) -> keras.Model:
    """ResNet-18: a stem, four stages of two basic blocks, a global average, one dense layer.

    Padding, pooling and batch-norm constants are those of torchvision's `resnet18`. No convolution has a
    bias: each is followed by a batch norm, which would subtract it.

    Args:
        input_shape: (height, width, channels); a side may be None. Images are expected roughly standardised.
        num_outputs: number of labels or classes.
        activation: of the last layer: "sigmoid" for independent labels, "softmax" for exclusive classes.
        stem: 3 for a 3x3 convolution of stride 1 (images up to about 64 pixels, the usual CIFAR variant), 7
            for the 7x7 convolution of stride 2 and the max pooling of the ImageNet network.
        width: channels of the first stage; the stages have 1, 2, 4 and 8 times as many.
        seed: fixes the initial weights; None draws them from Keras's global seed.
        name: of the model.

    Returns:
        A Functional `keras.Model`, (batch, height, width, channels) -> (batch, num_outputs), float32
        probabilities.

    Raises:
        ValueError: `stem` is neither 3 nor 7, or a size is not usable.

    Reference: He, Zhang, Ren and Sun 2016, "Deep Residual Learning for Image Recognition", Table 1.
    """
    if stem not in (3, 7):
        raise ValueError(f"Expected stem to be 3 or 7 (the kernel's side). Received: stem={stem}")
    _check_sizes(input_shape, num_outputs)
    inputs = keras.Input(input_shape, name="image")
    x = _stem(inputs, width, stem, seed)
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage > 0 and block == 0 else 1
            x = _basic_block(x, width * 2**stage, stride, f"stage{stage + 1}_block{block + 1}", seed)
    x = keras.layers.GlobalAveragePooling2D(name="average")(x)
    outputs = _dense(x, num_outputs, "head", seed, activation=activation, dtype="float32")
    return keras.Model(inputs, outputs, name=name)


def resnet18_paper(
    input_shape: tuple[int, int, int] = (224, 224, 1),
    num_outputs: int = 14,
    activation: str = "sigmoid",
    seed: int | None = None,
    name: str = "resnet18_paper",
) -> keras.Model:
    """The network that the paper calls ResNet-18: three residual blocks and two dense layers.

    A 7x7 stem of 64 channels, then blocks of 128, 256 and 512 channels, each of stride 2 and with a 1x1
    shortcut, an average, a dense layer of 1000 units *without* an activation (so the two dense layers make
    one linear map), and the output. At the default sizes it has 5,354,406 trainable parameters, the paper's
    5.35 M.

    Read from the paper's code: three blocks, the widths, 1000 units, and a bias in the stem, in the blocks'
    3x3 convolutions and in the dense layers, but none in the shortcuts. The printed count confirms the
    blocks, the second dense layer (4.83 M without) and the shortcuts without bias (5.36 M with); it can not
    show whether the other convolutions have one (5,352,550 without). Also from the code, and invisible in
    the count: batch norm *and* ReLU on the shortcut, no ReLU after the sum, and no activation between the
    dense layers.

    Args:
        input_shape: (height, width, channels).
        num_outputs: number of labels.
        activation: of the last layer.
        seed: fixes the initial weights; None draws them from Keras's global seed.
        name: of the model.

    Returns:
        A Functional `keras.Model`, (batch, height, width, channels) -> (batch, num_outputs), float32
        probabilities.

    Raises:
        ValueError: a size is not usable.

    Reference: Abboud, Lombaert and Kadoury 2024, "Sparse Bayesian Networks", section 3, and its code.
    """
    _check_sizes(input_shape, num_outputs)
    inputs = keras.Input(input_shape, name="image")
    x = _stem(inputs, 64, 7, seed, use_bias=True)
    for index, width in enumerate((128, 256, 512), start=1):
        block, shortcut = f"block{index}", x
        for conv, stride in ((1, 2), (2, 1)):
            x = _conv(x, width, 3, f"{block}_conv{conv}", seed, stride=stride, use_bias=True)
            x = _relu(_batch_norm(x, f"{block}_bn{conv}"), f"{block}_relu{conv}")
        shortcut = _conv(shortcut, width, 1, f"{block}_shortcut_conv", seed, stride=2)
        shortcut = _relu(_batch_norm(shortcut, f"{block}_shortcut_bn"), f"{block}_shortcut_relu")
        x = keras.layers.Add(name=f"{block}_add")([x, shortcut])
    # Differs from the paper: a global average, where the code has a 7x7 one and a flatten. At 224 pixels they
    # are the same; this one takes images of any size and keeps the number of weights.
    x = keras.layers.GlobalAveragePooling2D(name="average")(x)
    x = _dense(x, 1000, "hidden", seed)
    outputs = _dense(x, num_outputs, "head", seed, activation=activation, dtype="float32")
    return keras.Model(inputs, outputs, name=name)


def unet(
    input_shape: tuple[int | None, int | None, int],
    num_outputs: int = 1,
    widths: tuple[int, ...] = (32, 64, 128, 192),
    convs_per_level: int = 2,
    pooling: str = "max",
    upsampling: str = "bilinear",
    activation: str = "sigmoid",
    conv_bias: bool = False,
    seed: int | None = None,
    name: str = "unet",
) -> keras.Model:
    """U-Net: an encoder, a decoder, and a skip connection between equal resolutions.

    Each level is `convs_per_level` times 3x3 convolution, batch norm, ReLU; padding is "same", so the
    output has the input's size. By default the convolutions have no bias: in training mode a bias before a
    batch norm has no effect (the batch mean is subtracted), so the likelihood does not limit its
    noise, and if it is Bayesian the KL inflates its scale towards the prior's; in inference mode that noise
    reaches the output.

    Args:
        input_shape: (height, width, channels); sides divisible by `2**(len(widths) - 1)`, or None.
        num_outputs: channels of the output: 1 for the probability of foreground.
        widths: channels of each level, from full resolution down.
        convs_per_level: convolutions in each encoder level and in each decoder level.
        pooling: "max" or "average", 2x2.
        upsampling: "bilinear" (no weights), or "transpose" (a 2x2 transposed convolution, with bias).
        activation: of the last layer: "sigmoid", or "softmax" over the channels.
        conv_bias: give the 3x3 convolutions a bias all the same.
        seed: fixes the initial weights; None draws them from Keras's global seed.
        name: of the model.

    Returns:
        A Functional `keras.Model`, (batch, height, width, channels) -> (batch, height, width, num_outputs),
        float32 probabilities.

    Raises:
        ValueError: a side is not divisible, or an option is unknown.

    Reference: Ronneberger, Fischer and Brox 2015, "U-Net", Figure 1 (there without padding and batch norm).
    """
    _check_sizes(input_shape, num_outputs)
    if pooling not in ("max", "average") or upsampling not in ("bilinear", "transpose"):
        raise ValueError(
            "Expected pooling 'max' or 'average', upsampling 'bilinear' or 'transpose'. "
            f"Received: pooling={pooling!r}, upsampling={upsampling!r}"
        )
    factor = 2 ** (len(widths) - 1)
    if any(side is not None and side % factor for side in input_shape[:2]):
        raise ValueError(
            f"Expected image sides divisible by {factor} ({len(widths)} levels). Received: input_shape={input_shape}"
        )

    def level(x, width, prefix):
        for index in range(1, convs_per_level + 1):
            x = _conv(x, width, 3, f"{prefix}_conv{index}", seed, use_bias=conv_bias)
            x = _relu(_batch_norm(x, f"{prefix}_bn{index}"), f"{prefix}_relu{index}")
        return x

    pool = keras.layers.MaxPooling2D if pooling == "max" else keras.layers.AveragePooling2D
    inputs = keras.Input(input_shape, name="image")
    x, skips = inputs, []
    for depth, width in enumerate(widths, start=1):
        if skips:
            x = pool(2, name=f"encoder{depth}_pool")(x)
        x = level(x, width, f"encoder{depth}")
        skips.append(x)
    for depth in range(len(widths) - 1, 0, -1):
        width, up = widths[depth - 1], f"decoder{depth}_up"
        if upsampling == "bilinear":
            x = keras.layers.UpSampling2D(2, interpolation="bilinear", name=up)(x)
        else:
            initializer = keras.initializers.HeNormal(seed=layer_seed(seed, up))
            x = keras.layers.Conv2DTranspose(width, 2, strides=2, kernel_initializer=initializer, name=up)(x)
        x = keras.layers.Concatenate(name=f"decoder{depth}_concat")([x, skips[depth - 1]])
        x = level(x, width, f"decoder{depth}")
    initializer = keras.initializers.GlorotUniform(seed=layer_seed(seed, "head"))
    outputs = keras.layers.Conv2D(
        num_outputs, 1, activation=activation, kernel_initializer=initializer, dtype="float32", name="head"
    )(x)
    return keras.Model(inputs, outputs, name=name)


UNET_PAPER: dict[str, dict[str, Any]] = {
    "lidc": {"input_shape": (128, 128, 1), "widths": (32, 64, 128, 192)},
    "isic": {"input_shape": (224, 224, 3), "widths": (32, 64, 128, 256, 366)},
}


def unet_paper(
    dataset: str,
    input_shape: tuple[int | None, int | None, int] | None = None,
    num_outputs: int = 1,
    activation: str | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> keras.Model:
    """The paper's U-Net: three convolutions a level, average pooling, bilinear up-sampling, biases.

    Trainable parameters at the default input shapes, for two outputs as in the paper's code (softmax over
    background and foreground): "lidc" 2,264,034, the paper's 2.26 M; "isic" 8,801,544, its 8.80 M. With one
    sigmoid output, the default, there are 33 fewer, for the same family of probability maps. Widths, three
    convolutions in each encoder *and* decoder level, biases and two outputs are read from the paper's code.
    The printed counts confirm the three convolutions (1.54 M and 6.03 M with two) and the up-sampling
    without weights (2.28 M and 8.90 M with transposed convolutions); they can not show whether the
    convolutions have biases (2,262,114 and 8,797,566 without) or whether there are one or two outputs.

    Args:
        dataset: "lidc" (widths 32-64-128-192, 128 x 128 x 1) or "isic" (32-64-128-256-366, 224 x 224 x 3).
        input_shape: None for the paper's; else (height, width, channels), sides divisible by 8 or 16.
        num_outputs: 1: the probability of foreground; 2 or more: of each channel, background first.
        activation: of the last layer; None: "sigmoid" for one output, "softmax" over the channels for more.
        seed: fixes the initial weights; None draws them from Keras's global seed.
        name: of the model; None for "unet_paper_<dataset>".

    Returns:
        A Functional `keras.Model`, (batch, height, width, channels) -> (batch, height, width, num_outputs),
        float32 probabilities.

    Raises:
        ValueError: `dataset` is unknown, or a side is not divisible.

    Reference: Abboud, Lombaert and Kadoury 2024, "Sparse Bayesian Networks", section 3, and its code.
    """
    if dataset not in UNET_PAPER:
        raise ValueError(f"Expected dataset to be one of {list(UNET_PAPER)}. Received: dataset={dataset!r}")
    # Differs from the paper: its bilinear up-sampling aligns the corners, Keras's aligns the pixels' areas.
    # Both are without weights, and differ by less than a pixel.
    return unet(
        input_shape or UNET_PAPER[dataset]["input_shape"],
        num_outputs,
        widths=UNET_PAPER[dataset]["widths"],
        convs_per_level=3,
        pooling="average",
        upsampling="bilinear",
        activation=activation or ("sigmoid" if num_outputs == 1 else "softmax"),
        conv_bias=True,
        seed=seed,
        name=name or f"unet_paper_{dataset}",
    )


# name -> (function, its options): recipes name a network by a string and numbers, never by a function.
NETWORKS: dict[str, tuple[Callable[..., keras.Model], dict[str, Any]]] = {
    "resnet18": (resnet18, {}),
    "resnet18_small": (resnet18, {"width": 16, "name": "resnet18_small"}),
    "resnet18_paper": (resnet18_paper, {}),
    "unet": (unet, {}),
    "unet_small": (unet, {"widths": (8, 16, 32), "name": "unet_small"}),
    "unet_medium": (unet, {"widths": (16, 32, 64, 96), "name": "unet_medium"}),  # 13 times the weights of unet_small
    "unet_paper_lidc": (unet_paper, {"dataset": "lidc"}),
    "unet_paper_isic": (unet_paper, {"dataset": "isic"}),
}


def build(
    network: str,
    input_shape: tuple[int | None, int | None, int],
    num_outputs: int,
    seed: int | None = None,
    **options,
) -> keras.Model:
    """Build a network by its name, as recipes do.

    Args:
        network: a key of `NETWORKS`; "resnet18_small" (width 16) and "unet_small" (widths 8, 16, 32) train in
            seconds on two CPU cores.
        input_shape: (height, width, channels).
        num_outputs: labels, or output channels.
        seed: fixes the initial weights; None draws them from Keras's global seed.
        **options: passed to the network's function; they override the registry's.

    Returns:
        A Functional `keras.Model` with float32 probabilities as output.

    Raises:
        ValueError: `network` is unknown.
    """
    if network not in NETWORKS:
        raise ValueError(f"Expected network to be one of {sorted(NETWORKS)}. Received: network={network!r}")
    function, defaults = NETWORKS[network]
    return function(input_shape=tuple(input_shape), num_outputs=num_outputs, seed=seed, **{**defaults, **options})
