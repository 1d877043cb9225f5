# oanet_R_50_1x.yaml as a LazyConfig. The batch and the learning rate are for 8 GPUs.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.data.training_stream import build_train_loader, training_dicts
from oanet_d2.engine import build_evaluator
from oanet_d2.modeling import OANet, OANetSemSegFPNHead, PairwiseRankingHead

model = model_zoo.get_config("common/models/panoptic_fpn.py").model
model._target_ = OANet
model.backbone.bottom_up.freeze_at = 2
model.sem_seg_head._target_ = OANetSemSegFPNHead
model.sem_seg_head.num_things = 80
model.sem_seg_head.num_classes = 80 + 53  # things and stuff
model.srm_head = L(PairwiseRankingHead)(
    num_classes="${..roi_heads.num_classes}",
    evidence=["geometry", "semantic", "features"],
    feature_channels="${..backbone.out_channels}",
)
model.gt_false_positives = 0.3  # only for model.train_masks = "gt"
model.return_fusion_inputs = True  # the evaluator paints in several orders

dataloader = model_zoo.get_config("common/data/coco_panoptic_separated.py").dataloader
dataloader.train._target_ = build_train_loader
dataloader.train.dataset._target_ = training_dicts
dataloader.train.dataset.names = "coco_2017_train_oanet"
dataloader.test.dataset.names = "coco_2017_val_oanet"
for _mapper in (dataloader.train.mapper, dataloader.test.mapper):
    _mapper._target_ = PanopticDatasetMapper
    _mapper.num_things = "${model.roi_heads.num_classes}"
    _mapper.stuff_only = False
    _mapper.ignore_value = "${model.sem_seg_head.ignore_value}"
dataloader.evaluator = L(build_evaluator)(
    dataset_name="${..test.dataset.names}",
    output_dir="${train.output_dir}",
    model=None,  # the trained model is put here
    orders=["score", "srm_pairs", "oracle"],
    train_names="${..train.dataset.names}",
)

optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x

train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.srm_only_share = 0.0  # SOLVER.SRM_ONLY_SHARE of a yaml
train.seed = -1
