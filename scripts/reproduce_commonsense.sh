#!/usr/bin/env bash
# The S2FT paper's commonsense table: trains each row on commonsense_170k and answers the eight test sets.
# shellcheck source=scripts/reproduce_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/reproduce_common.sh"

parse "usage: reproduce_commonsense.sh [--dry-run] [ROW…] [-- SETTING…]" \
    {s2ft,lora,dora,full}_{llama2,llama3}_commonsense -- "$@"

PUBLISHED=https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main
for task in boolq piqa social_i_qa hellaswag winogrande ARC-Easy ARC-Challenge openbookqa; do
    download "$PUBLISHED/dataset/$task/test.json" "$DATA/$task/test.json"
done
download "$PUBLISHED/ft-training_set/commonsense_170k.json" "$DATA/commonsense_170k.json"

for row in "${ROWS[@]}"; do
    train "$row" dataset=commonsense "dataset.train_path=$DATA/commonsense_170k.json"
    evaluate "$row" commonsense "eval.data_dir=$DATA"
done
table commonsense
