#!/bin/sh
# Minke, for real: from the bundled base over the specialist minke-skills to one model that was told of a town, and their
# table: about four hours on two cores with bf16 products.
#
#   scripts/minke.sh
#
# Every part goes on where it was stopped (kill it any time, start it again); a finished part is passed over. Needs the
# extras agents and test, and for the desk tasks a container sandbox. Length training is a recipe of its own
# (recipes/posttrain/minke-length.toml), which begins from minke-skills.
set -eu
cd "$(dirname "$0")/.."

phase() { # name
    if [ ! -f "runs/$1/model/config.json" ]; then
        if [ -d "runs/$1/checkpoints" ]; then
            rorqual train --resume --run-dir "runs/$1"
        else
            rorqual train --recipe "recipes/phases/$1.toml"
        fi
    fi
}

tune() { # recipe, folder
    if [ -d "$2" ]; then
        rorqual posttrain --resume --run-dir "$2"
    else
        rorqual posttrain --recipe "$1"
    fi
}

made() { # file, command that writes what --out names
    if [ ! -f "$1" ]; then
        file=$1
        shift
        python -m "$@" --out "$file.part"
        mv "$file.part" "$file"
    fi
}

phase minke-2k
phase minke-8k
made runs/desk.jsonl rorqual.agents.practice --count 700 --seed 1
tune minke-skills runs/minke-skills
phase minke-town
tune minke runs/minke-posttrain
model() { # folder of a posttrain run: the model of its last stage
    for stage in "$1"/[0-9]*; do last=$stage; done
    echo "$last/model"
}
python benchmarks/minke_posttrain.py base=minke phase=runs/minke-8k/model \
    "skills=$(model runs/minke-skills)" "tuned=$(model runs/minke-posttrain)" | tee runs/minke-posttrain.txt
