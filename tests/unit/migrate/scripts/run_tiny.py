"""A launch script as a program."""

import os
from dataclasses import dataclass

import external.commands as U


@dataclass
class ScriptArgs(U.Config):
    model: str = "tiny"
    num_gpus: int = 2
    offload: bool = False
    extra: str = ""

    def __post_init__(self):
        self.batch = 8 * self.num_gpus


def execute(args: ScriptArgs):
    ckpt = f"--hf-checkpoint /models/{args.model} --save {U.new_folder()}/out "
    data = os.environ.get("DATA", "/data/train.jsonl")
    rollout = (
        f"--prompt-data {data} "
        "--label-key answer "
        # a remark
        "--rm-type math "
        f"--num-rollout {1 if args.model == 'huge' else 5} "
        f"--rollout-batch-size {args.batch} "
    )
    if args.offload:
        rollout += "--colocate "
    U.execute_train(
        train_args=f'{ckpt} {rollout} --train-env-vars \'{{"A": "1"}}\' {args.extra}',
        num_gpus_per_node=args.num_gpus,
        megatron_model_type="tiny",
        extra_env_vars={"NVTE_DEBUG": "1"},
    )


if __name__ == "__main__":
    execute(ScriptArgs())
