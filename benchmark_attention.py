"""The benchmark of attention layers: what `tilewise bench` runs, with the same flags, from this checkout.

python benchmark_attention.py
python benchmark_attention.py --models deepseek_v3 llama3_70b --layers mha gqa --num_runs 200 --dtype bfloat16
python benchmark_attention.py --device cpu --batch 1 --seq_len 256 --hidden 256 --heads 8 --num_runs 10
python benchmark_attention.py --sweep seq_len --pass inference
python benchmark_attention.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from tilewise.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench"]
    main()
