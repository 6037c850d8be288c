# Everything runs in .venv, which every target makes if it is not there.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo demo-live ray cluster test test-full conformance check docs audit sbom dist bench reproduce reproduce-quick clean

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=24"
	$(BIN)/pip install --quiet -e ".[all,dev,docs,release]"
	touch $(STAMP)

# install, tune, train, compare against production autoscalers and the clairvoyant bound, write the report
demo: $(STAMP)
	$(BIN)/pilotage study experiments/quickstart.toml
	$(BIN)/pilotage explain results/quickstart quickstart --hours 1.5 --out results/quickstart
	$(BIN)/pilotage report results/quickstart

# the closed loop on real parts: Ray Serve (in .ray), Prometheus, steer; at most 6 minutes once they are installed
demo-live: $(STAMP) ray
	command -v prometheus > /dev/null || { apt-get update && RUNLEVEL=1 apt-get install -y --no-install-recommends prometheus; } > /dev/null
	$(BIN)/python experiments/live_loop/run.py --out runs/live_loop

# a Ray Serve of its own, as what it needs does not go together with MLflow
ray: .ray/.installed
.ray/.installed:
	test -x .ray/bin/python || $(PYTHON) -m venv .ray
	.ray/bin/pip install --quiet "ray[serve]==2.60.0"
	touch $@

# Dask, Ray and the driver of PostgreSQL, for runs on many machines and experiments/workers.py
cluster: .venv/.cluster
.venv/.cluster: $(STAMP)
	$(BIN)/pip install --quiet -e ".[cluster]"
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not full"

# what takes minutes: the built wheel in an empty environment, the code blocks of the documentation, trainings, real clusters
test-full: $(STAMP)
	$(BIN)/python -m pytest -m full

# every case of the originals that a policy is checked against, by name, and the upstream tests among them
conformance: $(STAMP)
	$(BIN)/python -m pytest -v tests/contracts/test_*_conformance.py tests/oracle/test_formulae.py
	$(BIN)/python -m pytest -q -s tests/contracts/test_upstream_names.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@$(MAKE) --no-print-directory audit

# the documentation as a site, in site/
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# known vulnerabilities of what is installed, by pip-audit; where no service answers nothing is audited, and that is said
AUDIT := build/audit.txt
audit: $(STAMP)
	@mkdir -p build; code=0; timeout 120 $(BIN)/pip-audit --progress-spinner off --skip-editable --timeout 10 > $(AUDIT) 2>&1 || code=$$?; \
	if grep -q "^Found .* known vulnerabilit" $(AUDIT); then cat $(AUDIT); exit 1; \
	elif [ $$code != 0 ]; then echo "audit: no answer from a vulnerability service; left out"; \
	else echo "audit: no known vulnerability; not known to the service: $$(grep -c 'could not be audited' $(AUDIT)) packages"; fi

# what is installed, as a CycloneDX bill of materials
sbom: $(STAMP)
	mkdir -p build
	$(BIN)/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml --of JSON -o build/sbom.json $(BIN)/python

# wheel and source distribution, built and checked
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# speed, side by side with peers; writes results/bench
bench: $(STAMP)
	$(BIN)/python experiments/bench.py
	$(BIN)/python experiments/llm_serving/bench.py $(if $(DATA),--data $(DATA))

# every experiment; needs the traces: DATA=folder (default: PILOTAGE_DATA)
DATA ?= $(PILOTAGE_DATA)
reproduce: $(STAMP) ray cluster bench
	$(BIN)/pilotage study experiments/quickstart.toml
	$(BIN)/pilotage study experiments/real_traffic.toml --data $(DATA)
	$(BIN)/python experiments/placement/run.py
	$(BIN)/python experiments/placement/joint.py
	$(BIN)/python experiments/placement/spot.py
	$(BIN)/python experiments/ledger.py
	$(BIN)/python experiments/export/run.py
	$(BIN)/python experiments/scaling/learn.py --data $(DATA)
	$(BIN)/python experiments/scaling/tune.py --data $(DATA)
	$(BIN)/python experiments/scaling/judge.py --data $(DATA) --split validate
	$(BIN)/python experiments/scaling/zero_shot.py --data $(DATA)
	$(BIN)/python experiments/scaling/configure.py --data $(DATA)
	$(BIN)/python experiments/scaling/configure.py --data $(DATA) --llm
	$(BIN)/python experiments/scaling/forecasts.py --data $(DATA)
	$(BIN)/python experiments/retraining/run.py --data $(DATA)
	$(BIN)/python experiments/retraining/caution.py --data $(DATA)
	$(BIN)/python experiments/drift_detection/run.py
	$(BIN)/python experiments/anomaly/run.py --data $(DATA)
	$(BIN)/python experiments/fleet_lifecycle/run.py
	$(BIN)/python experiments/canary/run.py
	$(BIN)/python experiments/rollout/run.py
	$(BIN)/python experiments/rollback/run.py
	$(BIN)/python experiments/bias_gate/run.py --data $(DATA)
	$(BIN)/python experiments/explain/run.py
	$(BIN)/python experiments/traffic_fit.py --data $(DATA)
	$(BIN)/python experiments/fidelity/ray_serve/run.py --data $(DATA)
	$(BIN)/python experiments/steer/run.py
	$(BIN)/python experiments/calibrate/run.py
	$(BIN)/python experiments/rehearse/run.py
	$(BIN)/python experiments/plan/run.py --data $(DATA)
	$(BIN)/python experiments/profile/run.py
	$(BIN)/python experiments/workers.py
	$(BIN)/python experiments/cleanrl_ppo.py
	$(BIN)/python experiments/fidelity/vidur/run.py --data $(DATA)
	$(BIN)/python experiments/fidelity/vllm/run.py --data $(DATA)
	$(BIN)/python experiments/fidelity/silicon/run.py --data $(DATA)
	$(BIN)/python experiments/fidelity/h100/run.py
	$(BIN)/python experiments/llm_profiles/run.py --data $(DATA)
	$(BIN)/python experiments/llm_scaling/run.py --data $(DATA)
	$(BIN)/python experiments/live_loop/run.py --thorough
	$(BIN)/python experiments/leaderboard/run.py --data $(DATA)

# the quick forms of the experiments, into build/reproduce, beside the committed results
reproduce-quick: $(STAMP)
	$(BIN)/python experiments/reproduce_quick.py $(if $(DATA),--data $(DATA))

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site
