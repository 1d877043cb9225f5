from detectron2.config import CfgNode as CN


def add_oanet_config(cfg):
    """
    Add OANet's keys to a Detectron2 config, with their defaults. Keys that mean the same as in
    Detectron2 are not repeated: `MODEL.ROI_HEADS.NUM_CLASSES` is the number of thing classes
    everywhere, `MODEL.PANOPTIC_FPN.COMBINE.*` are the combiner's thresholds.

    Args:
        cfg (CfgNode): changed in place.
    """
    # ---------------------------------------------------------------- classes
    # 0: as many as the dataset has, filled in by :func:`oanet_d2.complete_config`. (Detectron2's
    # defaults are COCO's 80 and 54.)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 0

    # ---------------------------------------------------------------- semantic head
    # What the semantic head is supervised on (OANetSemSegFPNHead):
    #   "things_and_stuff": L_seg(stuff+object) of the paper. SEM_SEG_HEAD.NUM_CLASSES is
    #       #things + #stuff; channel c < #things is thing class c, the stuff classes follow.
    #   "stuff": Panoptic FPN's convention. NUM_CLASSES is 1 + #stuff; channel 0 is "any thing".
    #       A model zoo Panoptic FPN head fits this one (54 classes on COCO).
    cfg.MODEL.SEM_SEG_HEAD.SUPERVISION = "things_and_stuff"

    # ---------------------------------------------------------------- spatial ranking module
    cfg.MODEL.SRM_HEAD = CN()
    # "SpatialRankingHead" (the paper's) or "PairwiseRankingHead" (that, and a comparison of pairs).
    cfg.MODEL.SRM_HEAD.NAME = "PairwiseRankingHead"
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
    # Where the instances that it learns from come from; every step takes one of these at random:
    #   "gt": ground-truth masks,
    #   "pred": the mask head's output on the ground-truth boxes,
    #   "detections": what inference would give, with its duplicates and mistakes.
    # At inference it always sees detections.
    cfg.MODEL.SRM_HEAD.TRAIN_MASKS = ("detections",)
    # "gt": probability that a ground-truth mask gets a made-up false positive beside it, a moved
    # and stretched copy of lower score, so that a ranking that never sees a detector learns what
    # a detection score is worth. 0: ground truth as it is, with scores of 1 (the paper's).
    cfg.MODEL.SRM_HEAD.GT_FALSE_POSITIVES = 1.0
    # The feature map that a head may look at.
    cfg.MODEL.SRM_HEAD.IN_FEATURE = "p2"

    # NAME "PairwiseRankingHead": besides the score map, a comparison of every two instances that
    # overlap (MODEL.OANET.ORDER "srm_pairs").
    cfg.MODEL.SRM_HEAD.PAIRS = CN()
    # What it is told of a pair, besides the two classes; see PairwiseRankingHead. "geometry" and
    # "score_map" come from masks alone, "semantic" and "features" from the image.
    cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = ("geometry", "semantic", "features")
    # Networks that compare, each with weights of its own; the mean of their answers decides.
    cfg.MODEL.SRM_HEAD.PAIRS.NUM_NETWORKS = 4
    # Channels that IN_FEATURE is projected to, and width of the two hidden layers.
    cfg.MODEL.SRM_HEAD.PAIRS.FEATURE_DIM = 64
    cfg.MODEL.SRM_HEAD.PAIRS.HIDDEN_DIM = 128
    # Share of the hidden layers' numbers that is dropped in training.
    cfg.MODEL.SRM_HEAD.PAIRS.DROPOUT = 0.3
    # While nothing but the ranking learns (SOLVER.SRM_ONLY_SHARE, MODEL.OANET.TRAIN_SRM_ONLY, training
    # from annotations), the last MEMORY pairs are remembered, and every network learns in each step
    # from MEMORY_BATCH of them besides the new ones. They are kept in the checkpoints. 0: none. (None
    # either with "score_map" in EVIDENCE, which learns along.)
    cfg.MODEL.SRM_HEAD.PAIRS.MEMORY = 50000
    cfg.MODEL.SRM_HEAD.PAIRS.MEMORY_BATCH = 128
    # Weight of the loss over pairs.
    cfg.MODEL.SRM_HEAD.PAIRS.LOSS_WEIGHT = 1.0

    # ---------------------------------------------------------------- fusion
    cfg.MODEL.OANET = CN()
    # The rule that orders the instances before painting: "score" (detection score, as Panoptic
    # FPN), "srm_mean" (the paper's Eq. 3), "srm_overlap" (who wins inside each overlap) or
    # "srm_pairs" (the comparison of pairs, SRM_HEAD.NAME "PairwiseRankingHead").
    cfg.MODEL.OANET.ORDER = "srm_pairs"
    # What happens where no instance is painted. True: a pixel whose best semantic class is a
    # thing stays free (void). False: it takes its best *stuff* class (the paper: only the stuff
    # scores are used).
    cfg.MODEL.OANET.KEEP_THINGS_FREE = True

    # What results hold beyond "panoptic_seg" and the instances' boxes, scores and classes:
    #   "pred_masks": the instances' masks, N x H x W, which evaluators of instances want.
    #   "sem_seg": the scores of the semantic branch, classes x H x W, which evaluators of semantic
    #       segmentation want.
    # Both are what PanopticFPN gives, and most of the time and memory after the network. Where
    # only "panoptic_seg" is of interest set this to (): the masks are then painted without being
    # made, with the same result, and the semantic labels are made without the scores, which
    # differ only where two classes are equal up to rounding.
    cfg.MODEL.OANET.OUTPUTS = ("pred_masks", "sem_seg")

    # ---------------------------------------------------------------- speed
    # Ways to run the same network; what each gains is in docs/performance.md.
    # True: images, weights and feature maps are kept channels last, in training too.
    cfg.MODEL.OANET.CHANNELS_LAST = False
    # True: inference in torch.inference_mode. What it returns can then never be part of something
    # that is differentiated.
    cfg.MODEL.OANET.INFERENCE_MODE = False
    # Inference in mixed precision: "bfloat16", or "float16" (not on a CPU); "": in single precision.
    # (Training: SOLVER.AMP.ENABLED, which on a CPU is bfloat16.)
    cfg.MODEL.OANET.AUTOCAST = ""
    # True: while images of 2**19 pixels or more are run on a CPU, glibc's malloc keeps freed memory for
    # the next feature map, instead of giving it back to the kernel, which would clear it once more. At
    # the end it is given back. Faster, but gaps between the maps raise the peak. A setting of the whole
    # process while it lasts. Without glibc it does nothing.
    cfg.MODEL.OANET.REUSE_MEMORY = False
    # True: the backbone is compiled with torch.compile when it is first used, which takes a while,
    # once for training and once for inference. On a CPU it needs a C++ compiler.
    cfg.MODEL.OANET.COMPILE = False

    # ---------------------------------------------------------------- training
    # True: everything but the ranking head is frozen, in evaluation mode and without gradients.
    cfg.MODEL.OANET.TRAIN_SRM_ONLY = False
    # Load checkpoints by unpickling whatever they hold. A pickle can run any code: leave this
    # False unless you trust the file. Model zoo files and Detectron2's own load without it.
    cfg.MODEL.ALLOW_PICKLE = False
    # "SGD" (Detectron2's) or "ADAMW", which learns a network from scratch in fewer iterations.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # A training in two parts. In this share of the iterations, the last ones, the ranking head learns
    # alone, as with MODEL.OANET.TRAIN_SRM_ONLY: from a network that does not change any more and is
    # run as at inference. Before, the network learns without the ranking head, which costs nothing
    # there and orders nothing yet. The learning rate begins anew in the last part and falls to 0; its
    # schedule before, WARMUP_ITERS and STEPS, is that of a training that ends there.
    # 0: one part, in which both learn.
    cfg.SOLVER.SRM_ONLY_SHARE = 0.0

    # ---------------------------------------------------------------- evaluation
    # Painting orders to compare on the same predictions at evaluation: rules as in
    # MODEL.OANET.ORDER, and "oracle" (the order that the ground truth gives). Empty: only
    # MODEL.OANET.ORDER is evaluated. The result is written to OUTPUT_DIR/orderings.json.
    cfg.TEST.ORDERS = ()
    # Pictures of the images where MODEL.OANET.ORDER gains most over "score", written to
    # OUTPUT_DIR/pictures, and of those where "oracle" gains most over it, to
    # OUTPUT_DIR/pictures_still_wrong, as far as TEST.ORDERS holds the two. So many of each, and of
    # each kind of case in the report.
    cfg.TEST.ORDER_PICTURES = 12
    # Pictures of panoptic results for TensorBoard, at every evaluation within a training. So many,
    # always of the same images; 0 for none.
    cfg.TEST.TENSORBOARD_PICTURES = 4

    # ---------------------------------------------------------------- data
    # Panoptic datasets to register, by name; each has IMAGE_ROOT, PANOPTIC_JSON, PANOPTIC_ROOT and,
    # if there is one, INSTANCES_JSON: the arguments of :func:`oanet_d2.register_panoptic`.
    cfg.DATASETS.PANOPTIC = CN(new_allowed=True)
    # False: train without ever opening an image (MODEL.META_ARCHITECTURE "SRMFromAnnotations").
    cfg.INPUT.READ_IMAGE = True
    # Size of the synthetic dataset (occlusion_scenes_{train,val}*), made on first use.
    cfg.DATASETS.OCCLUSION_SCENES = CN()
    cfg.DATASETS.OCCLUSION_SCENES.TRAIN_IMAGES = 4000
    cfg.DATASETS.OCCLUSION_SCENES.VAL_IMAGES = 200
    # Side of the square images in pixels.
    cfg.DATASETS.OCCLUSION_SCENES.IMAGE_SIZE = 192
    # What all of them are drawn from; another seed, other scenes.
    cfg.DATASETS.OCCLUSION_SCENES.SEED = 0
