# The grid: datasets x folds x seeds x methods x r_bayes, each job a numbered notebook executed by papermill.
#
#   snakemake --profile profiles/smoke        # phantoms, minutes
#   snakemake --profile profiles/small        # real data, small networks, hours on 2 cores
#   snakemake --profile profiles/paper -n     # what it would run; python -m sbn_tf grid estimate profiles/paper: what it takes
#
# Step 1 and the scores are made once for each dataset, fold and seed, and shared by every method and share of weights.
# A notebook appears under its name only when it is whole. A job that was killed goes on from its last epoch; one that
# failed leaves X.failed.ipynb behind and does not stop the others. docs/grid.md says more.

import shlex
import sys
from pathlib import Path

from snakemake.cli import parse_args

from sbn_tf.experiments import estimates, grid, grid_results, plan, study

if "plan" not in config:
    sys.exit("Expected a profile with a key `plan`. Received: none. Run snakemake --profile profiles/smoke.")
try:
    PLAN = plan.plan_of(config["plan"], Path(workflow.configfiles[0]).as_posix())
    AGAIN = []
    DRY = workflow.is_main_process and parse_args(sys.argv[1:])[1].dryrun  # Snakemake knows it later
    if workflow.is_main_process:  # a cluster's jobs read this file again, while others write
        study.check_names(PLAN)
        grid_results.check_folder(PLAN)
        AGAIN = grid.damaged(PLAN)
        for path in AGAIN:
            print(f"The result of {path} is gone or damaged: that job is run again.", file=sys.stderr)
    ESTIMATES = estimates.kept_estimates(PLAN, new=not DRY)  # counting takes minutes for large networks
except (ValueError, OSError) as error:
    sys.exit(str(error))

PROFILE = Path(workflow.configfiles[0]).as_posix()
FOLDER = PLAN.folder.as_posix()
JOBS = {f"{FOLDER}/{job.path}": job for job in grid.jobs(PLAN)}
NEEDS = estimates.needs(PLAN, ESTIMATES)
UNIT = f"{FOLDER}/{{dataset}}/fold{{fold}}/seed{{seed}}"
# Kind of job -> what its name looks like, and its priority: many jobs wait for the first two.
KINDS = {
    "step1": ("step1", 10),
    "saliency": ("saliency", 9),
    "partial": ("partial_r[0-9.e-]+", 0),
    "baseline": ("(?!step1|saliency|partial_r[0-9])[a-z0-9_]+", 0),
}

# Papermill starts the notebook in nbs/; the environment keeps the threads of parallel jobs from fighting. The progress
# line at the end never decides whether a job has succeeded.
PYTHON = shlex.quote(sys.executable)
EXECUTE = (
    "export OMP_NUM_THREADS={threads} TF_NUM_INTRAOP_THREADS={threads} TF_NUM_INTEROP_THREADS=1\n"
    "f={output:q}; f=${{f%.ipynb}}; rm -f $f.failed.ipynb\n"
    "if {PYTHON} -m papermill --cwd nbs --no-progress-bar nbs/{params.notebook}.ipynb $f.running.ipynb"
    " {params.options} > {log:q} 2>&1\n"
    "then mv $f.running.ipynb $f.ipynb\n"
    "else mv $f.running.ipynb $f.failed.ipynb || true; tail -n 3 {log:q} >&2; exit 1; fi\n"
    "{PYTHON} -m sbn_tf grid status {PROFILE:q} --cores {workflow.cores} --brief || true"
)


def job_of(wildcards):
    return JOBS[f"{UNIT.format(**wildcards)}/{wildcards.job}.ipynb"]


def before(wildcards):
    """Notebooks that must be there first."""
    job = job_of(wildcards)
    if job.path in AGAIN:  # as by --forcerun: a dry run lists it too, and nothing is deleted before the job starts
        workflow.dag.forcefiles.add(f"{FOLDER}/{job.path}")
    return [path for one in grid.before(job) if (path := f"{FOLDER}/{one}") in JOBS]


def need(what):
    """A resource of a job, from the estimates."""
    return lambda wildcards: NEEDS[wildcards.dataset, job_of(wildcards).kind][what]


wildcard_constraints:
    dataset="[^/]+",
    fold="-?[0-9]+",
    seed="[0-9]+",


localrules: all


rule all:
    input:
        list(JOBS),


for KIND, (NAME, PRIORITY) in KINDS.items():

    rule:
        name:
            KIND
        input:
            before,
        output:
            f"{UNIT}/{{job,{NAME}}}.ipynb",
        params:
            options=lambda wildcards: grid.papermill_options(PLAN, job_of(wildcards)),
            notebook=grid.NOTEBOOKS[KIND],
        threads: PLAN.threads
        resources:
            mem_mb=need("mem_mb"),
            runtime=need("runtime"),
            gpu=PLAN.gpus,
        priority: PRIORITY
        log:
            f"{UNIT}/{{job}}.log",
        benchmark:
            f"{UNIT}/{{job}}.tsv"
        shell:
            EXECUTE


onstart:
    grid_results.claim(PLAN, ESTIMATES)


onsuccess:
    shell("{PYTHON} -m sbn_tf grid finish {PROFILE:q}")


onerror:
    shell("{PYTHON} -m sbn_tf grid finish {PROFILE:q}")
