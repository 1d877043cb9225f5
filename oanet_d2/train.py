"""
Train, resume or evaluate what a config describes: a simplified version of the training script in
detectron2/tools.
"""

import sys
from typing import List, Optional

from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from . import lazy
from .checkpoint import OANetCheckpointer
from .config import find_config, is_lazy, load_config
from .data import complete_config
from .data.check import check_datasets
from .engine import OANetTrainer, prepare_datasets
from .output_folder import prepare_output_folder

__all__ = ["evaluate", "main", "run", "setup"]


def setup(args):
    """Create configs and perform basic setups."""
    args.config_file = find_config(args.config_file)  # default_setup reads it too
    cfg = load_config(args.config_file, args.opts)
    complete_config(cfg)
    cfg.freeze()
    prepare_output_folder(cfg, args.resume, args.eval_only)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="oanet_d2")
    prepare_datasets(cfg)
    return cfg


def run(args):
    if is_lazy(args.config_file):
        return lazy.run(args)
    cfg = setup(args)

    if args.eval_only:
        check_datasets(cfg, cfg.DATASETS.TEST)
        model = OANetTrainer.build_model(cfg)
        checkpointer = OANetCheckpointer(model, cfg.OUTPUT_DIR, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = OANetTrainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(OANetTrainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = OANetTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main(argv: Optional[List[str]] = None) -> None:
    """The command line of Detectron2's training script, in as many processes as it asks for."""
    args = default_argument_parser().parse_args(argv)
    print("Command Line Args:", args)
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def evaluate() -> None:
    main(["--eval-only", *sys.argv[1:]])
