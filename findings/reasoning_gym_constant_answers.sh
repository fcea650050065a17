#!/usr/bin/env bash
# reasoning-gym 0.1.25: four of its scorers give the full score to one fixed text on every problem.
#
# Guess: a constant is next to never right in coin_flip (a probability is asked for), puzzle24 and complex_arithmetic, and
# one time in two in game_of_life_halting (True or False), since the scorers compare with the problem at hand.
# Seen: 1.0 on each of 20 problems, for "0", "4*6*(8 - 7)", "nan" and any word. Why, by reading the scorers:
# coin_flip divides the length of the common beginning by the shorter length, and all probabilities begin with 0;
# puzzle24 asks for four numbers in range that make 24, not for those that were given; min(1.0, exp(-nan)) is 1.0 in
# Python; game_of_life_halting compares the truth of two texts, and every text but the empty one is true.
#
# A policy that is trained on such a generator learns the text, with a reward of 1.
#
# Output seen (reasoning-gym 0.1.25, Python 3.11):
#   coin_flip '0': 20 of 20 problems with full score
#   complex_arithmetic 'nan': 20 of 20 problems with full score
#   game_of_life_halting 'hello': 20 of 20 problems with full score
#   puzzle24 '4*6*(8 - 7)': 20 of 20 problems with full score
#   chain_sum '0': 0 of 20 problems with full score
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet reasoning-gym==0.1.25
"$folder/venv/bin/python" - <<'PY' | tee "$folder/output"
import reasoning_gym

for name, text in (
    ("coin_flip", "0"),
    ("complex_arithmetic", "nan"),
    ("game_of_life_halting", "hello"),
    ("puzzle24", "4*6*(8 - 7)"),
    ("chain_sum", "0"),
):
    problems = reasoning_gym.create_dataset(name, seed=7, size=20)
    full = sum(problems.score_answer(text, entry) >= 1.0 for entry in problems)
    print(f"{name} {text!r}: {full} of 20 problems with full score")
PY
diff <(grep '^#   ' "$0" | sed 's/^#   //') "$folder/output" && echo "as described"
