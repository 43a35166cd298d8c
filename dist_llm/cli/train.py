"""Train the run that a config describes, or go on with it.

Works alike under the deepspeed launcher, torchrun and srun; alone it is one rank with the plain engine:

  dist-llm train configs/tiny/llama.yaml data.path=corpus
  deepspeed --num_gpus 2 --module dist_llm train CONFIG [a.b=c ...]
  torchrun --nproc-per-node 2 -m dist_llm train CONFIG [a.b=c ...]
  srun dist-llm train CONFIG [a.b=c ...]              (see slurm/train.sbatch)

The same command again goes on from the newest checkpoint. SIGTERM and SIGUSR1 save and exit 75, Ctrl-C saves and exits 130,
a second Ctrl-C stops at once. --dry-run resolves everything and writes nothing.
"""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dist-llm train``."""
    parser.add_argument("config", help="YAML file, see docs/config.md")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="values that win over the file")
    parser.add_argument(
        "--dry-run", action="store_true", help="resolve layout, parameters, memory, first batch, steps and disk; write nothing"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: the number of ranks to plan for (default: the launcher's)")
    parser.add_argument("--json", action="store_true", help="with --dry-run: one JSON object on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Run ``dist-llm train``."""
    from dist_llm.config.load import load_config
    from dist_llm.engine.ranks import read_launch
    from dist_llm.utils.errors import ConfigError

    if (arguments.json or arguments.ranks is not None) and not arguments.dry_run:
        raise ConfigError("--json and --ranks belong to --dry-run; the launcher decides how many ranks train")
    launch = read_launch()
    try:
        # The config first: a typo should not cost the import of torch.
        config = load_config(arguments.config, arguments.overrides).config
    except ConfigError as error:
        error.is_echo = not launch.is_main  # every rank reads the same file
        raise
    if arguments.dry_run:
        from dist_llm.engine.dry_run import dry_run

        return dry_run(config, ranks=arguments.ranks, as_json=arguments.json)
    from dist_llm.engine.stop import StopFlag

    # Before the seconds of imports that follow, in which a job can be pre-empted too, and never undone: a Ctrl-C while Python shuts
    # down would turn the exit code of a saved run into a traceback.
    stop = StopFlag()
    stop.install()
    from dist_llm.engine.attempt import run_attempt

    return run_attempt(config, launch, stop)
