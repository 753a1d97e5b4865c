"""Five posterior samples in a training step, here and in other libraries: one ResNet-18, each in its own framework.

Run: `python benchmarks/peers.py [--torch-python PYTHON] [--quick]`. PYTHON is an interpreter that has torch and
bayesian-torch (default: this one); `tfp.layers` needs tf-keras. What is not installed says so in its row.

Every library is timed in a process of its own, one after the other, on `--threads` threads of the CPU. Steps are full
ones: forward, backward, Adam; batch norm is frozen in all of them. Each is a ratio to the deterministic step of its
framework, the median over pairs timed in turn: frameworks differ in speed, and that is not the question. *Trainable* is
what trains, over what trains in the deterministic network.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time

LIBRARIES = ("sbn_tf", "bayesian-torch", "tfp.layers")
NUM_SAMPLES, LABELS = 5, 14


def blocks(width):
    """(name, channels, stride, whether the shortcut has a convolution) of the eight blocks of a ResNet-18."""
    before = width
    for stage in range(4):
        for block in range(2):
            channels, stride = width * 2**stage, 2 if stage > 0 and block == 0 else 1
            yield f"stage{stage + 1}_block{block + 1}", channels, stride, stride > 1 or channels != before
            before = channels


def measure_sbn_tf(args):
    """This library: all entries Bayesian, and a random 1 %, which leaves no layer without: the dearest masks."""
    import floor
    import keras
    import numpy as np

    from sbn_tf import saliency
    from sbn_tf.experiments import networks
    from sbn_tf.partial_bayes import to_partial_bayes

    floor.device(args.threads)
    base = networks.resnet18((args.size, args.size, 1), LABELS, width=args.width, seed=0)
    for layer in base.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    scores = saliency.saliency(base, score="random")
    networks = {"deterministic": base, "five passes": floor.Passes(base, NUM_SAMPLES)}
    for r_bayes, estimator in ((0.01, "all"), (0.01, "split"), (1.0, "all"), (1.0, "split")):
        options = {"num_train": 1000, "num_samples": NUM_SAMPLES, "estimator": estimator, "seed": 0}
        masks = saliency.top_k(scores, r_bayes)
        networks[f'{100 * r_bayes:g} % Bayesian, "{estimator}"'] = to_partial_bayes(base, masks, **options)
    x, y = (keras.ops.convert_to_tensor(a) for a in batch(args))
    calls = {}
    for name, model in networks.items():
        step = floor.training_step(floor.compiled(model), x, y)
        calls[name] = (lambda step=step: step(1), sum(int(np.prod(v.shape)) for v in model.trainable_variables))
    return calls


def measure_bayesian_torch(args):
    """`dnn_to_bnn` on PyTorch: every weight Bayesian, a Monte Carlo mean of five passes."""
    import torch
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss
    from torch import nn

    torch.set_num_threads(args.threads or os.cpu_count())

    class Block(nn.Module):
        def __init__(self, before, channels, stride, shortcut):
            super().__init__()
            self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
            self.norm1 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.norm2 = nn.BatchNorm2d(channels)
            self.shortcut = None
            if shortcut:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
                )

        def forward(self, x):
            y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
            return torch.relu(y + (x if self.shortcut is None else self.shortcut(x)))

    def network():
        parts, before = (
            [nn.Conv2d(1, args.width, 3, padding=1, bias=False), nn.BatchNorm2d(args.width), nn.ReLU()],
            None,
        )
        before = args.width
        for _, channels, stride, shortcut in blocks(args.width):
            parts.append(Block(before, channels, stride, shortcut))
            before = channels
        parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, LABELS)]
        return nn.Sequential(*parts)

    def frozen(model):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                for parameter in module.parameters():
                    parameter.requires_grad = False
        return model

    x, y = (torch.from_numpy(a) for a in batch(args))
    x, loss_of = x.permute(0, 3, 1, 2).contiguous(), nn.BCEWithLogitsLoss()

    def call(model, passes, bayesian):
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(weights, 1e-4)

        def step():
            optimizer.zero_grad()
            loss = sum(loss_of(model(x), y) for _ in range(passes)) / passes
            if bayesian:
                loss = loss + get_kl_loss(model) / (1000 * LABELS)
            loss.backward()
            optimizer.step()
            loss.item()

        return step, sum(p.numel() for p in weights)

    calls = {"deterministic": call(frozen(network()), 1, False)}
    calls["five passes"] = call(frozen(network()), NUM_SAMPLES, False)
    for kind in ("Reparameterization", "Flipout"):
        model = network()
        prior = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -4.0}
        dnn_to_bnn(model, {**prior, "type": kind, "moped_enable": False, "moped_delta": 0.5})
        calls[f"100 % Bayesian, {kind}"] = call(frozen(model), NUM_SAMPLES, True)
    return calls


def measure_tfp_layers(args):
    """`tfp.layers` in a tf_keras model: every kernel Bayesian, five calls in one compiled step."""
    import tensorflow as tf
    import tensorflow_probability as tfp
    import tf_keras

    if args.threads:
        tf.config.threading.set_intra_op_parallelism_threads(args.threads)
        tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    layers = tf_keras.layers

    def network(kind):
        def kl(posterior, prior, _):
            return tfp.distributions.kl_divergence(posterior, prior) / (1000 * LABELS)

        def conv(x, filters, side, stride=1):
            options = {"strides": stride, "padding": "valid" if stride > 1 else "same"}
            if stride > 1 and side > 1:
                x = layers.ZeroPadding2D(1)(x)  # as in `sbn_tf.experiments.networks`
            if kind is None:
                return layers.Conv2D(filters, side, use_bias=False, **options)(x)
            cls = getattr(tfp.layers, f"Convolution2D{kind}")
            return cls(filters, side, bias_posterior_fn=None, kernel_divergence_fn=kl, **options)(x)

        def norm(x):
            return layers.BatchNormalization(trainable=False)(x)

        inputs = tf_keras.Input((args.size, args.size, 1))
        x = layers.ReLU()(norm(conv(inputs, args.width, 3)))
        for _, channels, stride, shortcut in blocks(args.width):
            y = layers.ReLU()(norm(conv(x, channels, 3, stride)))
            y = norm(conv(y, channels, 3))
            x = layers.ReLU()(layers.Add()([y, norm(conv(x, channels, 1, stride)) if shortcut else x]))
        x = layers.GlobalAveragePooling2D()(x)
        if kind is None:
            return tf_keras.Model(inputs, layers.Dense(LABELS)(x))
        return tf_keras.Model(inputs, getattr(tfp.layers, f"Dense{kind}")(LABELS, kernel_divergence_fn=kl)(x))

    x, y = (tf.constant(a) for a in batch(args))
    loss_of = tf_keras.losses.BinaryCrossentropy(from_logits=True)
    ones = tf.Variable(tf.ones(NUM_SAMPLES), trainable=False)  # so that nothing merges equal passes

    def call(kind, passes):
        model, optimizer = network(kind), tf_keras.optimizers.Adam(1e-4)

        @tf.function
        def train():
            with tf.GradientTape() as tape:
                data = [loss_of(y, model(x * ones[i], training=True)) for i in range(passes)]
                loss = tf.add_n(data) / passes + (tf.add_n(model.losses) if model.losses else 0.0)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return loss

        return lambda: float(train()), sum(int(tf.size(v)) for v in model.trainable_variables)

    calls = {"deterministic": call(None, 1), "five passes": call(None, NUM_SAMPLES)}
    for kind in ("Reparameterization", "Flipout"):
        calls[f"100 % Bayesian, {kind}"] = call(kind, NUM_SAMPLES)
    return calls


def batch(args):
    """Images and labels of noise: what they show costs nothing."""
    import numpy as np

    x = np.random.default_rng(0).normal(size=(args.batch, args.size, args.size, 1)).astype("float32")
    return x, (np.random.default_rng(1).random((args.batch, LABELS)) < 0.1).astype("float32")


def timed(calls, repeats):
    """For each call its seconds, its ratio to the deterministic step in turn with it, and its trainable entries."""
    import numpy as np

    def seconds(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    one, entries = calls["deterministic"]
    rows = {}
    for name, (call, number) in calls.items():
        one(), call()  # traces
        pairs = np.array([(seconds(call), seconds(one)) for _ in range(repeats)])
        low, median, high = np.percentile(pairs[:, 0] / pairs[:, 1], [25, 50, 75])
        rows[name] = {
            "ratio": median,
            "quartiles": [low, high],
            "seconds": float(np.median(pairs[:, 0])),
            "trainable": number / entries,
        }
    return rows


NEEDED = {"sbn_tf": ("keras",), "bayesian-torch": ("torch", "bayesian_torch"), "tfp.layers": ("tf_keras",)}
MEASURE = dict(zip(LIBRARIES, (measure_sbn_tf, measure_bayesian_torch, measure_tfp_layers), strict=True))


def main():
    """Measure each library in its process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch and bayesian-torch")
    parser.add_argument("--size", type=int, help="side of the images in pixels (64)")
    parser.add_argument("--batch", type=int, help="images in a batch (50)")
    parser.add_argument("--width", type=int, help="channels of the first stage (64)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; 0: all")
    parser.add_argument("--repeats", type=int, help="pairs a row (5)")
    parser.add_argument("--quick", action="store_true", help="a small network and images: to see that it runs")
    parser.add_argument("--measure", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    usual, quick = (
        {"size": 64, "batch": 50, "width": 64, "repeats": 5},
        {"size": 16, "batch": 5, "width": 4, "repeats": 1},
    )
    for name, value in (quick if args.quick else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.measure:
        missing = [name for name in NEEDED[args.measure] if importlib.util.find_spec(name) is None]
        print(json.dumps({"missing": missing} if missing else timed(MEASURE[args.measure](args), args.repeats)))
        return

    print(f"ResNet-18 of width {args.width}, {args.size} px, batch {args.batch}, {NUM_SAMPLES} samples, CPU")
    print("\n| library | step | / its deterministic step [quartiles] | seconds | trainable |\n|---|---|---|---|---|")
    # TFP's layers are Keras 2, which is tf_keras. No GPU: one of the frameworks may not see it.
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "TF_USE_LEGACY_KERAS": "1"}
    failed = []
    for library in args.libraries:
        python = args.torch_python if library == "bayesian-torch" else sys.executable
        command = [python, __file__, "--measure", library]
        for name in ("size", "batch", "width", "threads", "repeats"):
            command += [f"--{name}", str(getattr(args, name))]
        own = {k: v for k, v in environment.items() if library == "tfp.layers" or k != "TF_USE_LEGACY_KERAS"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=own)
        if done.returncode:
            failed.append(library)
            continue
        rows = json.loads(done.stdout.splitlines()[-1])
        if "missing" in rows:
            print(f"| {library} | not installed: {', '.join(rows['missing'])} | | | |", flush=True)
            continue
        for name, row in rows.items():
            spread = "[{:.2f}, {:.2f}]".format(*row["quartiles"])
            print(
                f"| {library} | {name} | {row['ratio']:.2f} {spread} | {row['seconds']:.3g} | {row['trainable']:.3f} |",
                flush=True,
            )
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
