#!/usr/bin/env python3
"""
OANet training script: trains, resumes or evaluates what a config describes.

This script is a simplified version of the training script in detectron2/tools.
"""

from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from oanet_d2 import complete_config, load_config
from oanet_d2.checkpoint import OANetCheckpointer
from oanet_d2.data.check import check_datasets
from oanet_d2.engine import OANetTrainer, prepare_datasets
from oanet_d2.output_folder import prepare_output_folder


def setup(args):
    """Create configs and perform basic setups."""
    cfg = load_config(args.config_file, args.opts)
    complete_config(cfg)
    cfg.freeze()
    prepare_output_folder(cfg, args.resume, args.eval_only)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="oanet_d2")
    prepare_datasets(cfg)
    return cfg


def main(args):
    cfg = setup(args)

    if args.eval_only:
        check_datasets(cfg, cfg.DATASETS.TEST)
        model = OANetTrainer.build_model(cfg)
        checkpointer = OANetCheckpointer(model, cfg.OUTPUT_DIR, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = OANetTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = OANetTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def invoke_main() -> None:
    args = default_argument_parser().parse_args()
    print("Command Line Args:", args)
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    invoke_main()  # pragma: no cover
