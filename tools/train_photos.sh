#!/usr/bin/env bash
# Train and evaluate a small OANet on photographs: tools/train_photos.sh FOLDER [KEY VALUE ...]
# FOLDER has images/{train,val}, panoptic_{train,val}, panoptic_{train,val}.json and, if there are whole
# masks, instances_{train,val}.json. Results go to output/NAME_OF_FOLDER. Python is $PY, by default python.
set -e
folder=$(cd "${1:?FOLDER is missing}" && pwd -P)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
opts=(OUTPUT_DIR "output/$(basename "$folder")")
for split in train val; do
    key=DATASETS.PANOPTIC.photographs_$split
    instances=$folder/instances_$split.json
    test -e "$instances" || instances=""
    opts+=("$key.IMAGE_ROOT" "$folder/images/$split" "$key.PANOPTIC_JSON" "$folder/panoptic_$split.json"
        "$key.PANOPTIC_ROOT" "$folder/panoptic_$split" "$key.INSTANCES_JSON" "$instances")
done
exec "${PY:-python}" train_net.py --config-file configs/photographs.yaml "${opts[@]}" "$@"
