"""SFT and reward-model training: TRL's trainers on our data, renderer and run directory."""

from prefopt.stages.run import run_stage

__all__ = ["run_stage"]
