from detectron2.config import CfgNode as CN


def add_oanet_config(cfg):
    """
    Add OANet's keys to a Detectron2 config, with their defaults. Keys that mean the same as in
    Detectron2 are not repeated: `MODEL.ROI_HEADS.NUM_CLASSES` is the number of thing classes
    everywhere, `MODEL.PANOPTIC_FPN.COMBINE.*` are the combiner's thresholds.

    Args:
        cfg (CfgNode): changed in place.
    """
    # ---------------------------------------------------------------- semantic head
    # What the semantic head is supervised on (OANetSemSegFPNHead):
    #   "things_and_stuff": L_seg(stuff+object) of the paper. SEM_SEG_HEAD.NUM_CLASSES is
    #       #things + #stuff; channel c < #things is thing class c, the stuff classes follow.
    #   "stuff": Panoptic FPN's convention. NUM_CLASSES is 1 + #stuff; channel 0 is "any thing".
    #       A model zoo Panoptic FPN head fits this one (54 classes on COCO).
    cfg.MODEL.SEM_SEG_HEAD.SUPERVISION = "things_and_stuff"

    # ---------------------------------------------------------------- spatial ranking module
    cfg.MODEL.SRM_HEAD = CN()
    cfg.MODEL.SRM_HEAD.NAME = "SpatialRankingHead"
    # Width and number of the large-kernel blocks (k x 1, then 1 x k), and k. Cells, not pixels:
    # on the image one block sees KERNEL_SIZE * STRIDE pixels. The paper leaves these open.
    cfg.MODEL.SRM_HEAD.CONV_DIM = 64
    cfg.MODEL.SRM_HEAD.NUM_BLOCKS = 2
    cfg.MODEL.SRM_HEAD.KERNEL_SIZE = 15
    # Normalization of the blocks; see detectron2.layers.get_norm for the names.
    cfg.MODEL.SRM_HEAD.NORM = ""
    # Pixels of the input image per cell of the instance tensor and of the score map.
    cfg.MODEL.SRM_HEAD.STRIDE = 4
    # Weight of L_srm in the total loss.
    cfg.MODEL.SRM_HEAD.LOSS_WEIGHT = 1.0
    # A cell belongs to an instance where its mask probability is at least this (paper, sec. 3.3).
    cfg.MODEL.SRM_HEAD.MASK_THRESH = 0.5
    # The masks that the instance tensor is made of in training: "gt" (ground truth), "pred"
    # (the mask head's output on the ground-truth boxes) or "both" (one tensor of each; the loss
    # is their mean). At inference it is always the predicted instances.
    cfg.MODEL.SRM_HEAD.TRAIN_MASKS = "gt"

    # ---------------------------------------------------------------- fusion
    cfg.MODEL.OANET = CN()
    # The rule that orders the instances before painting: "score" (detection score, as Panoptic
    # FPN), "srm_mean" (the paper's Eq. 3) or "srm_overlap" (who wins inside each overlap).
    cfg.MODEL.OANET.ORDER = "srm_overlap"
    # What happens where no instance is painted. True: a pixel whose best semantic class is a
    # thing stays free (void). False: it takes its best *stuff* class (the paper: only the stuff
    # scores are used).
    cfg.MODEL.OANET.KEEP_THINGS_FREE = True

    # ---------------------------------------------------------------- training
    # "SGD" (Detectron2's) or "ADAMW", which learns a network from scratch in fewer iterations.
    cfg.SOLVER.OPTIMIZER = "SGD"

    # ---------------------------------------------------------------- evaluation
    # Painting orders to compare on the same predictions at evaluation: rules as in
    # MODEL.OANET.ORDER, and "oracle" (the order that the ground truth gives). Empty: only
    # MODEL.OANET.ORDER is evaluated. The result is written to OUTPUT_DIR/orderings.json.
    cfg.TEST.ORDERS = ()
    # Pictures of the images where MODEL.OANET.ORDER and "score" differ most, written to
    # OUTPUT_DIR/pictures when TEST.ORDERS holds both.
    cfg.TEST.ORDER_PICTURES = 12

    # ---------------------------------------------------------------- data
    # Size of the synthetic dataset (occlusion_scenes_{train,val}), made on first use.
    cfg.DATASETS.OCCLUSION_SCENES = CN()
    cfg.DATASETS.OCCLUSION_SCENES.TRAIN_IMAGES = 1000
    cfg.DATASETS.OCCLUSION_SCENES.VAL_IMAGES = 200
    # Side of the square images in pixels.
    cfg.DATASETS.OCCLUSION_SCENES.IMAGE_SIZE = 192
    cfg.DATASETS.OCCLUSION_SCENES.SEED = 0
