#!/usr/bin/env bash
# The S2FT paper's arithmetic table: trains each row on math_10k and answers the seven test sets with four beams.
# shellcheck source=scripts/reproduce_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/reproduce_common.sh"

parse "usage: reproduce_arithmetic.sh [--dry-run] [ROW…] [-- SETTING…]" \
    {s2ft,lora,dora,full}_{llama2,llama3}_arithmetic -- "$@"

PUBLISHED=https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main
for task in MultiArith gsm8k AddSub AQuA SingleEq SVAMP mawps; do
    download "$PUBLISHED/dataset/$task/test.json" "$DATA/$task/test.json"
done
download "$PUBLISHED/ft-training_set/math_10k.json" "$DATA/math_10k.json"

for row in "${ROWS[@]}"; do
    train "$row" dataset=arithmetic "dataset.train_path=$DATA/math_10k.json"
    evaluate "$row" arithmetic "eval.data_dir=$DATA"
done
table arithmetic
