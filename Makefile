.PHONY: style quality test slow common bench

style:
	ruff check --fix .
	ruff format .

quality:
	ruff check .
	ruff format --check .

test:
	python -m pytest -n 2 -m "not slow and not gpu"

slow:
	python -m pytest -m "slow and not gpu"

common:
	python -m pytest -n 2 -rfE tests/common

bench:
	python hub_kernels/spatial-range-attention/build_local.py cpu
	python benchmarks/benchmark_spatial_range_attention.py --kernel hub_kernels/spatial-range-attention/build
	python benchmarks/draw_chart.py
