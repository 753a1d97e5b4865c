# The grid: datasets x folds x seeds x methods x r_bayes, each job a numbered notebook executed by papermill.
#
#   snakemake --profile profiles/smoke        # phantoms, minutes
#   snakemake --profile profiles/small        # real data, small networks, hours on 2 cores
#   snakemake --profile profiles/paper -n     # what it would run; python -m sbn_tf.experiments.grid estimate profiles/paper: what it takes
#
# Step 1 and the scores are made once for each dataset, fold and seed, and shared by every method and share of weights.
# A notebook appears under its name only when it is whole: a job that was killed goes on from its last epoch, one that
# failed leaves X.failed.ipynb behind and does not stop the others. `python -m sbn_tf.experiments.grid` says more.

import shlex
import sys
from pathlib import Path

from sbn_tf import grid

if "grid" not in config:
    sys.exit("Expected a profile with a key `grid`. Received: none. Run snakemake --profile profiles/smoke.")
try:
    PLAN = grid.plan_of(config["grid"])
    if workflow.is_main_process:  # a cluster's jobs read this file again, while others write
        grid.check_names(PLAN)
        grid.check_folder(PLAN)
        for path in grid.forget_damaged(PLAN):
            print(f"The result of {path} is gone or damaged: that job is run again.", file=sys.stderr)
except (ValueError, OSError) as error:
    sys.exit(str(error))

PROFILE = Path(workflow.configfiles[0]).as_posix()
FOLDER = PLAN.folder.as_posix()
JOBS = {f"{FOLDER}/{job.path}": job for job in grid.jobs(PLAN)}
NEEDS = grid.estimates_for_scheduler(PLAN)
UNIT = f"{FOLDER}/{{dataset}}/fold{{fold}}/seed{{seed}}"


def of_job(kind, place):
    """A resource from the estimates: memory in MB, or minutes."""
    return lambda wildcards: NEEDS[wildcards.dataset, kind][place]


def options(wildcards, percent=None, method=None):
    """Papermill's parameters of a job."""
    return grid.papermill_options(PLAN, wildcards.dataset, int(wildcards.fold), int(wildcards.seed), percent, method)


# Papermill starts the notebook in nbs/; the environment keeps the threads of parallel jobs from fighting. The progress
# line comes from the module as a file, without TensorFlow, and never decides whether a job has succeeded.
PYTHON = shlex.quote(sys.executable)
EXECUTE = (
    "export OMP_NUM_THREADS={threads} TF_NUM_INTRAOP_THREADS={threads} TF_NUM_INTEROP_THREADS=1 TF_CPP_MIN_LOG_LEVEL=3\n"
    "f={output:q}; f=${{f%.ipynb}}; rm -f $f.failed.ipynb\n"
    "if {PYTHON} -m papermill --cwd nbs --no-progress-bar NOTEBOOK $f.running.ipynb {params.options} > {log:q} 2>&1\n"
    "then mv $f.running.ipynb $f.ipynb\n"
    "else mv $f.running.ipynb $f.failed.ipynb || true; tail -n 3 {log:q} >&2; exit 1; fi\n"
    "{PYTHON} sbn_tf/experiments/grid.py status {PROFILE:q} --cores {workflow.cores} --brief || true"
)


wildcard_constraints:
    dataset="[^/]+",
    fold="-?[0-9]+",
    seed="[0-9]+",
    percent="[0-9.e-]+",
    method="(?!step1|saliency|partial_r[0-9])[a-z0-9_]+",


localrules: all


rule all:
    input:
        list(JOBS),


rule step1:
    output:
        f"{UNIT}/step1.ipynb",
    params:
        options=lambda wildcards: options(wildcards),
    threads: PLAN.threads
    resources:
        mem_mb=of_job("step1", "mem_mb"),
        runtime=of_job("step1", "runtime"),
        gpu=PLAN.gpus,
    priority: 10
    log:
        f"{UNIT}/step1.log",
    benchmark:
        f"{UNIT}/step1.tsv"
    shell:
        EXECUTE.replace("NOTEBOOK", "nbs/01_deterministic.ipynb")


rule saliency:
    input:
        f"{UNIT}/step1.ipynb",
    output:
        f"{UNIT}/saliency.ipynb",
    params:
        options=lambda wildcards: options(wildcards),
    threads: PLAN.threads
    resources:
        mem_mb=of_job("saliency", "mem_mb"),
        runtime=of_job("saliency", "runtime"),
        gpu=PLAN.gpus,
    priority: 9
    log:
        f"{UNIT}/saliency.log",
    benchmark:
        f"{UNIT}/saliency.tsv"
    shell:
        EXECUTE.replace("NOTEBOOK", "nbs/02_saliency.ipynb")


rule partial:
    input:
        f"{UNIT}/saliency.ipynb",
    output:
        f"{UNIT}/partial_r{{percent}}.ipynb",
    params:
        options=lambda wildcards: options(wildcards, percent=float(wildcards.percent), method="partial"),
    threads: PLAN.threads
    resources:
        mem_mb=of_job("partial", "mem_mb"),
        runtime=of_job("partial", "runtime"),
        gpu=PLAN.gpus,
    log:
        f"{UNIT}/partial_r{{percent}}.log",
    benchmark:
        f"{UNIT}/partial_r{{percent}}.tsv"
    shell:
        EXECUTE.replace("NOTEBOOK", "nbs/04_baselines.ipynb")


def before_baseline(wildcards):
    """Scores for all; the longer ensemble continues the members of the ensemble, and shares one with another method."""
    unit, before = UNIT.format(**wildcards), ["saliency"]
    if wildcards.method == "ensemble_longer":
        before += ["ensemble", "deterministic_longer"]
    return [path for name in before if (path := f"{unit}/{name}.ipynb") in JOBS]


rule baseline:
    input:
        before_baseline,
    output:
        f"{UNIT}/{{method}}.ipynb",
    params:
        options=lambda wildcards: options(wildcards, percent=1.0, method=wildcards.method),
    threads: PLAN.threads
    resources:
        mem_mb=of_job("baseline", "mem_mb"),
        runtime=of_job("baseline", "runtime"),
        gpu=PLAN.gpus,
    log:
        f"{UNIT}/{{method}}.log",
    benchmark:
        f"{UNIT}/{{method}}.tsv"
    shell:
        EXECUTE.replace("NOTEBOOK", "nbs/04_baselines.ipynb")


onsuccess:
    shell("{PYTHON} -m sbn_tf.experiments.grid finish {PROFILE:q} --cores {workflow.cores}")


onerror:
    shell("{PYTHON} -m sbn_tf.experiments.grid finish {PROFILE:q} --cores {workflow.cores}")
