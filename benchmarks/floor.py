"""What a sparse Bayesian network costs above the floor: each row is a ratio of two calls timed in turn.

Run: `python benchmarks/floor.py [--networks resnet18 unet] [--r-bayes 0.001 0.01 0.05 0.2 1] [--out FILE] [--quick]`
(with `KERAS_BACKEND=jax` where JAX is to run it). An hour or two a network on 2 threads, with `--batch 10` a quarter.
Each row is written to FILE once it is there: the same command goes on where it was stopped, and prints those rows too.

- *Step*: one compiled training step (forward, backward, Adam) on a batch that stays in memory.
- *One step*: that of the deterministic network, batch norm frozen as it is in step 3 of the recipe.
- *Five passes*: the floor of `estimator="all"`: the deterministic network run five times, its five losses averaged, one
  backward pass through all five, one update. Each pass scales its input by a variable that holds 1, so that no compiler
  can merge the five.
- A ratio is the median over pairs timed in turn, in brackets its quartiles: a busy machine hits both calls alike.

The masks hold the largest scores of a network trained briefly on a phantom (`--score magnitude` or `random` need no
training; JAX takes `random`, which leaves no layer without); "saliency kept" is the share of all saliency that a mask
holds, over that of the largest scores wherever they lie. Rows that are not about the share of Bayesian entries use
`--at`.
"""

import argparse
import gc
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # leaves room for the processes that measure memory
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import keras
import numpy as np

from sbn_tf import saliency
from sbn_tf.core.graph import Graph
from sbn_tf.experiments import networks
from sbn_tf.partial_bayes import to_partial_bayes

BACKEND = keras.backend.backend()
NETWORKS = {"resnet18": (14, "phantom_chest"), "unet": (1, "phantom_nodule")}  # outputs; what it learns for its scores
NUM_SAMPLES = 5
AT_MOST_OF_OPERATIONS = (0.1, 0.25, 0.5)  # cost_aware
SCORED_BY = ("score", "size", "batch", "stem", "train_steps", "quick")  # what the scores depend on
# What makes two runs comparable: rows of other settings are not added to a file.
SETTINGS = ("size", "batch", "stem", "score", "train_steps", "threads", "repeats", "at", "quick")


class Passes(keras.Model):
    """The network run `number` times on the same batch: the mean of the outputs, in training of the losses."""

    def __init__(self, network, number):
        super().__init__()
        self.network, self.number = network, number
        self.ones = self.add_weight(name="ones", shape=(number,), initializer="ones", trainable=False)
        self.built = True

    def call(self, inputs, training=None):  # noqa: D102
        outputs = [self.network(inputs * self.ones[i], training=training) for i in range(self.number)]
        return {"passes": outputs} if training else sum(outputs) / self.number

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):  # noqa: D102
        return sum(self._compile_loss(y, output) for output in y_pred["passes"]) / self.number

    def compute_metrics(self, x, y, y_pred, sample_weight=None):  # noqa: D102
        return super().compute_metrics(x, y, sum(y_pred["passes"]) / self.number)


class Bench:
    """A network, a batch that stays in memory, the scores of its weights, and the calls that are timed."""

    def __init__(self, name, args):
        self.name, self.args = name, args
        outputs, self.phantom = NETWORKS[name]
        keras.utils.set_random_seed(0)
        stem = {"stem": args.stem} if name == "resnet18" else {}
        self.build = lambda: networks.build(
            f"{name}_small" if args.quick else name, (args.size, args.size, 1), outputs, seed=0, **stem
        )
        self.base = frozen(self.build())
        self.x, self.y = batch_for(self.base, args.batch)
        self.kept = {}

    @property
    def scores(self):
        """Saliency of every weight entry, kept in a file beside the rows: a later run reads it."""
        if "scores" not in self.kept:
            by = "_".join(str(getattr(self.args, name)) for name in SCORED_BY)
            path = self.args.out.with_name(f"{self.args.out.stem}_{self.name}_scores_{by}.npz")
            if not path.exists():
                np.savez(path, **self._scored())
            with np.load(path) as file:
                self.kept["scores"] = {key: file[key] for key in file.files}
        return self.kept["scores"]

    def _scored(self):
        args = self.args
        if args.score != "fisher":
            return saliency.saliency(self.base, score=args.score)
        from sbn_tf import datasets

        data, model = datasets.load(self.phantom, size=args.size), self.build()
        rater = {"rater": "mean"} if data.val.num_raters > 1 else {}
        model.compile(keras.optimizers.Adam(1e-3), "binary_crossentropy")
        stream = data.train.batches(args.batch, seed=0, epochs=1000, **rater)
        model.fit(stream, epochs=1, steps_per_epoch=args.train_steps, shuffle=False, verbose=0)
        stream = data.train.batches(10, seed=1, **rater)
        return saliency.saliency(model, stream, "binary_crossentropy", max_batches=20, verbose=False)

    def converted(self, masks, estimator="all"):
        """The partial Bayesian network, compiled as the deterministic one."""
        options = {"num_train": 1000, "num_samples": NUM_SAMPLES, "estimator": estimator, "seed": 0}
        return compiled(to_partial_bayes(self.base, masks, **options))

    def one(self):
        """The deterministic network, compiled."""
        if "one" not in self.kept:
            self.kept["one"] = compiled(self.base)
        return self.kept["one"]

    def passes(self):
        """The deterministic network run five times."""
        if "passes" not in self.kept:
            self.kept["passes"] = compiled(Passes(self.base, NUM_SAMPLES))
        return self.kept["passes"]

    def step(self, model):
        """A block of training steps: the seconds of one."""
        return self._warm(("step", id(model)), model, lambda: training_step(model, self.x, self.y))

    def prediction(self, model):
        """A block of predictions of the batch: the seconds of one."""

        def make():
            return lambda calls: [model.predict_on_batch(self.x) for _ in range(calls)]

        return self._warm(("prediction", id(model)), model, make)

    def _warm(self, key, model, make):
        """The call, traced and with the number of calls that a block needs; kept for the deterministic ones."""
        if key in self.kept:
            return self.kept[key]
        call = make()
        call(1)
        start = time.perf_counter()
        call(1)
        calls = max(1, math.ceil(self.args.block_seconds / (time.perf_counter() - start)))

        def seconds():
            begun = time.perf_counter()
            call(calls)
            return (time.perf_counter() - begun) / calls

        if model in (self.kept.get("one"), self.kept.get("passes")):
            self.kept[key] = seconds
        return seconds

    def ratio(self, above, below):
        """Two calls timed in turn."""
        return ratio_of(above, below, self.args.repeats, self.args.row_seconds, 1 if self.args.quick else 3)

    # ---- rows ----

    def all_step(self, r_bayes):
        """Five samples of the whole batch over five passes of it."""
        return self.ratio(self.step(self.converted(saliency.top_k(self.scores, r_bayes))), self.step(self.passes()))

    def estimator_step(self, estimator, r_bayes, **choice):
        """A step in which each draw serves a part of the batch, over a deterministic step."""
        masks = saliency.top_k(self.scores, r_bayes, **choice)
        row = self.ratio(self.step(self.converted(masks, estimator)), self.step(self.one()))
        return {**row, "note": self.kept_by(masks, r_bayes)} if choice else row

    def cost_aware(self, most, r_bayes, kind):
        """Five samples that fan out late, over one pass."""
        try:
            masks = saliency.top_k(self.scores, r_bayes, model=self.base, cost_aware=most)
        except ValueError as error:
            return {"note": f"no such masks: {error}"}
        call = getattr(self, kind)
        row = self.ratio(call(self.converted(masks)), call(self.one()))
        fan_out = Graph(self.base).fan_out([key for key, mask in masks.items() if mask.any()])
        floor = 1 + (NUM_SAMPLES - 1) * fan_out
        return {**row, "note": f"{fan_out:.3f} run again: floor {floor:.2f}; {self.kept_by(masks, r_bayes)}"}

    def kept_by(self, masks, r_bayes):
        """How much saliency masks hold, in words."""
        share = saliency.captured(self.scores, masks) / saliency.captured(
            self.scores, saliency.top_k(self.scores, r_bayes)
        )
        return f"saliency kept {share:.3f}"

    def plain_prediction(self, r_bayes):
        """Five samples predicted over five passes."""
        bnn = self.converted(saliency.top_k(self.scores, r_bayes))
        return self.ratio(self.prediction(bnn), self.prediction(self.passes()))

    def batch_norm(self):
        """A deterministic step in which batch norm trains, over the one in which it is frozen."""
        return self.ratio(self.step(compiled(self.build())), self.step(self.one()))

    def bytes_held(self, r_bayes):
        """Bytes of what trains, of the optimiser's state, and of all variables, over the deterministic network's."""
        bnn, one = self.converted(saliency.top_k(self.scores, r_bayes)), self.one()
        for model in (bnn, one):
            if not model.optimizer.built:
                model.optimizer.build(model.trainable_variables)
        slots = bytes_of(bnn.optimizer.variables) / bytes_of(one.optimizer.variables)
        whole = bytes_of(bnn.weights) / bytes_of(one.weights)
        return {
            "ratio": bytes_of(bnn.trainable_variables) / bytes_of(one.trainable_variables),
            "note": f"optimiser's state {slots:.4f}; all variables, positions included, {whole:.4f}",
        }

    def peak(self, kind, r_bayes, below):
        """Largest memory of two training steps, over another's: each in a process of its own."""
        self.scores  # noqa: B018 - the other processes read the file
        mine, theirs = (self._peak_of(k, r_bayes) for k in (kind, below))
        return {"ratio": mine / theirs, "note": f"{mine / 1e9:.2f} GB, {theirs / 1e9:.2f} GB"}

    def _peak_of(self, kind, r_bayes):
        key = ("peak", kind, r_bayes)
        if key not in self.kept:
            args = self.args
            command = [sys.executable, __file__, "--networks", self.name, "--peak-of", kind, "--at", str(r_bayes)]
            for name in ("size", "batch", "stem", "score", "train-steps", "threads", "out"):
                command += [f"--{name}", str(getattr(args, name.replace("-", "_")))]
            out = subprocess.run(
                command + (["--quick"] if args.quick else []), stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            self.kept[key] = float(out.splitlines()[-1])
        return self.kept[key]

    def peak_here(self, kind, r_bayes):
        """Bytes at the peak of two steps in this process, above what it held before; on a GPU, allocated there."""
        masks = saliency.top_k(self.scores, r_bayes)

        def two_steps():
            model = {"one": self.one, "passes": self.passes}.get(kind, lambda: self.converted(masks, kind))()
            training_step(model, self.x, self.y)(2)

        if BACKEND == "tensorflow":
            from sbn_tf import cost

            with cost.measured() as used:
                two_steps()
            return used.peak_bytes - used.start_bytes
        before = peak_bytes()
        two_steps()
        return peak_bytes() - before

    def recorder(self):
        """A step of an epoch that collects saliency over one of an epoch that does not."""
        model = self.one()
        steps = max(3, self.args.repeats) + 1
        data = [(self.x, self.y)] * steps

        def seconds(callbacks):
            clock = _Clock()
            model.fit(_Batches(data), epochs=1, shuffle=False, verbose=0, callbacks=[*callbacks, clock])
            return float(np.median(np.diff(clock.stamps)))  # the first step, which traces, is left out

        return self.ratio(lambda: seconds([saliency.SaliencyRecorder()]), lambda: seconds([]))


class _Clock(keras.callbacks.Callback):
    """The time at the end of each step."""

    def on_train_begin(self, logs=None):
        self.stamps = []

    def on_train_batch_end(self, batch, logs=None):
        logs and float(logs["loss"])  # waits for the device
        self.stamps.append(time.perf_counter())


class _Batches(keras.utils.PyDataset):
    """Batches that stay in memory."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def ratio_of(above, below, repeats, most_seconds=np.inf, fewest=1):
    """Seconds of `above()` over those of `below()`, timed in pairs, in turn; of `fewest` pairs on it ends in time."""
    pairs, start = [], time.perf_counter()
    while len(pairs) < repeats:
        if len(pairs) >= fewest and time.perf_counter() - start > most_seconds:
            break
        first = len(pairs) % 2
        seconds = [(above, below)[first](), (above, below)[1 - first]()]
        pairs.append(seconds[::-1] if first else seconds)
    pairs = np.array(pairs)
    low, median, high = np.percentile(pairs[:, 0] / pairs[:, 1], [25, 50, 75])
    return {
        "ratio": float(median),
        "quartiles": [float(low), float(high)],
        "seconds": float(np.median(pairs[:, 0])),
        "of_seconds": float(np.median(pairs[:, 1])),
        "pairs": len(pairs),
    }


def frozen(model):
    """The network with its batch norm frozen, as in step 3."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    return model


def batch_for(model, number):
    """Random images and labels of a network's shapes, as tensors."""
    x = np.random.default_rng(0).normal(size=(number, *model.input_shape[1:])).astype("float32")
    y = np.random.default_rng(1).random((number, *model.output_shape[1:])) < 0.1
    return keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y.astype("float32"))


def compiled(model):
    """The model with an optimiser and a loss; XLA as Keras decides (off on CPUs)."""
    model.compile(keras.optimizers.Adam(1e-4), "binary_crossentropy")
    return model


def training_step(model, x, y):
    """A function that does n training steps and waits for the device."""
    if BACKEND != "jax":

        def steps(number):
            for _ in range(number):
                model.train_on_batch(x, y)
            keras.ops.convert_to_numpy(min(model.trainable_variables, key=lambda v: math.prod(v.shape)))

        return steps

    import jax

    kinds = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")

    def steps(number):
        if model.train_function is None:
            model.train_on_batch(x, y)
        # Keras's own compiled step; `train_on_batch` writes every variable back after each, on the clock.
        state = model._get_jax_state(**dict.fromkeys(kinds, True))
        for _ in range(number):
            _, state = model.train_function(state, iter([(x, y)]))
        jax.block_until_ready(state)
        model._jax_state_synced, model._jax_state = False, dict(zip(kinds, state, strict=True))
        model.jax_state_sync()

    return steps


def bytes_of(variables):
    """Bytes held by variables."""
    return sum(math.prod(v.shape) * np.dtype(keras.backend.standardize_dtype(v.dtype)).itemsize for v in variables)


def peak_bytes():
    """Largest memory so far: allocated on the GPU, or resident in the process where there is none."""
    if BACKEND == "jax":
        import jax

        if stats := jax.devices()[0].memory_stats():
            return stats["peak_bytes_in_use"]
    elif BACKEND == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device(threads):
    """Settle how many threads a CPU gives, and name the device. To be called before anything else runs on it."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
        if threads:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
    elif BACKEND == "jax":
        if threads and hasattr(os, "sched_setaffinity"):
            whole = os.sched_getaffinity(0)
            os.sched_setaffinity(0, sorted(whole)[:threads])  # XLA makes as many threads as it may use cores
        import jax

        if jax.default_backend() != "cpu":
            if threads and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, whole)
            return jax.devices()[0].device_kind
    elif BACKEND == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(0)
    return f"CPU {_cpu()}, {threads or os.cpu_count()} threads"


def _cpu():
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def rows_of(bench, args):
    """(title, r_bayes, aim, function that measures) of each row; an aim of None: none was set."""
    at, name = args.at, f"{NUM_SAMPLES} samples"
    for r in sorted(args.r_bayes, key=lambda r: (r != at, r)):
        yield f'step, {name} ("all") / five passes', r, 1.02, lambda r=r: bench.all_step(r)
        yield 'step, "split" / one step', r, 1.10, lambda r=r: bench.estimator_step("split", r)
        yield "bytes of what trains / deterministic", r, 1 + r, lambda r=r: bench.bytes_held(r)
    for estimator in ("flipout", "local"):
        yield (
            f'step, "{estimator}" / one step',
            at,
            1.10,
            lambda estimator=estimator: bench.estimator_step(estimator, at),
        )
    yield (
        'step, "split", whole channels / one step',
        at,
        1.10,
        lambda: bench.estimator_step("split", at, scope="channel", model=bench.base),
    )
    for kind, word in (("step", "step"), ("prediction", "prediction")):
        if kind == "prediction":
            yield f"prediction, {name} / five passes", at, 1.02, lambda: bench.plain_prediction(at)
        for most in AT_MOST_OF_OPERATIONS:
            yield (
                f"{word}, {name}, cost_aware={most:g} / one",
                at,
                1.5 if most == min(AT_MOST_OF_OPERATIONS) else None,
                lambda most=most, kind=kind: bench.cost_aware(most, at, kind),
            )
    for kind, below, word in (("all", "passes", "five passes"), ("split", "one", "one step")):
        yield (
            f'peak memory, "{kind}" / {word}',
            at,
            None,
            lambda kind=kind, below=below: bench.peak(kind, at, below),
        )
    if BACKEND == "tensorflow":
        yield "step with saliency collected / without", None, 1.02, bench.recorder
    yield "step, batch norm training / frozen", None, None, bench.batch_norm


def line(title, r_bayes, aim, row):
    """A row as Markdown."""
    share = "" if r_bayes is None else f"{r_bayes:.4g}"
    found = f"{row['ratio']:.3f}" if "ratio" in row else ""
    if row.get("pairs", 0) > 1:
        found += " [{:.3f}, {:.3f}]".format(*row["quartiles"])
    missed = aim is not None and "ratio" in row and row["ratio"] > aim + 0.0005
    aim = "" if aim is None else f"{aim:.4g}{' missed' if missed else ''}"
    times = f"{row['seconds']:.3g} / {row['of_seconds']:.3g}" if "seconds" in row else ""
    return f"| {title} | {share} | {found} | {aim} | {times} | {row.get('pairs', '')} | {row.get('note', '')} |"


HEAD = "| | r_bayes | ratio [quartiles] | aim | seconds | pairs | |\n|---|---|---|---|---|---|---|"  # Markdown


def main():
    """Measure what is not yet in the file, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument(
        "--r-bayes", nargs="+", type=float, help="of the rows that have several (0.001 0.01 0.05 0.2 1)"
    )
    parser.add_argument("--at", type=float, default=0.01, help="r_bayes of the rows that have one only")
    parser.add_argument("--size", type=int, help="side of the images in pixels (64)")
    parser.add_argument("--batch", type=int, help="images in a batch (50)")
    parser.add_argument("--stem", type=int, default=3, choices=(3, 7), help="of the ResNet, see `models.resnet18`")
    parser.add_argument("--score", choices=("fisher", "magnitude", "random"), help="by which entries are chosen")
    parser.add_argument("--train-steps", type=int, help="steps of training before the Fisher scores (20)")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU; 0: all")
    parser.add_argument("--repeats", type=int, help="pairs a row, at most (7)")
    parser.add_argument("--row-seconds", type=float, default=45.0, help="a row stops after 3 pairs and so long")
    parser.add_argument("--block-seconds", type=float, help="least time between two looks at the clock (0.5)")
    parser.add_argument("--rows", default="", help="only rows whose title this regular expression finds")
    parser.add_argument(
        "--out", type=Path, help="JSON file of the rows (runs/floor_BACKEND.json); scores are kept beside it"
    )
    parser.add_argument("--quick", action="store_true", help="small networks and images: to see that it runs")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    usual = {
        "r_bayes": [0.001, 0.01, 0.05, 0.2, 1.0],
        "size": 64,
        "batch": 50,
        "train_steps": 20,
        "repeats": 7,
        "block_seconds": 0.5,
    }
    quick = {"r_bayes": [args.at], "size": 16, "batch": 10, "train_steps": 1, "repeats": 1, "block_seconds": 0.0}
    for name, value in (quick if args.quick else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.score = args.score or ("fisher" if BACKEND == "tensorflow" else "random")
    args.out = args.out or Path(f"runs/floor_{BACKEND}{'_quick' if args.quick else ''}.json")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    where = device(args.threads)
    if args.peak_of:
        print(Bench(args.networks[0], args).peak_here(args.peak_of, args.at))
        return

    settings = {"device": where, "backend": BACKEND, **{name: getattr(args, name) for name in SETTINGS}}
    known = json.loads(args.out.read_text()) if args.out.exists() else {"settings": settings, "rows": {}}
    if known["settings"] != settings:
        other = [name for name in settings if known["settings"].get(name) != settings[name]]
        parser.error(f"{args.out} holds rows of other settings ({', '.join(other)}): pass another --out.")
    print(
        f"{where}; Keras {keras.__version__} on {BACKEND}; {args.size} px, batch {args.batch}, {NUM_SAMPLES} samples, "
        f"masks by {args.score}{', quick' if args.quick else ''}"
    )
    failed = []
    for name in args.networks:
        bench = Bench(name, args)
        print(f"\n{name} ({bench.base.count_params():,} parameters)\n\n{HEAD}", flush=True)
        for title, r_bayes, aim, measure in rows_of(bench, args):
            key = f"{name}: {title}" + ("" if r_bayes is None else f" at {r_bayes:g}")
            if not re.search(args.rows, title):
                continue
            if key not in known["rows"]:
                try:
                    known["rows"][key] = measure()
                except Exception as error:
                    failed.append(f"{key}: {type(error).__name__}: {error}")
                    print(f"| {title} | {r_bayes or ''} | failed | | | | {type(error).__name__} |", flush=True)
                    continue
                temporary = args.out.with_suffix(".tmp")
                temporary.write_text(json.dumps(known, indent=1))
                os.replace(temporary, args.out)
                gc.collect()
            print(line(title, r_bayes, None if args.quick else aim, known["rows"][key]), flush=True)
    if failed:
        sys.exit("\nFailed rows, to be measured by the same command:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
