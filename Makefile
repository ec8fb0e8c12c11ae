.PHONY: style quality test slow common bench renew

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

# What README and docs print and draw: measured, then written.
EMBEDDED = benchmarks/results/embedded_model
renew:
	python examples/evaluate_scenes.py --scenes 1000 --train_args examples/embedded.args examples/embedded_open.args --output $(EMBEDDED)/scores.json
	python examples/evaluate_drawings.py --output $(EMBEDDED)/drawings.json
	python docs/renew.py --slow
	python docs/screenshots.py
