# `make demo` and `make test` install what they need into .venv, once.
PYTHON ?= python3
ARGS ?=
SEEDS ?= 0 1 2
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
RUN := $(BIN)/python
READY := .venv/installed
SITE := .venv/installed-site
# without what they pin: their modules run with the torch and transformers that are here
PEERS := flamingo-pytorch==0.1.2 open-flamingo==2.0.1 open-clip-torch==3.3.0 einops==0.8.2 \
	einops-exts==0.0.4 ftfy wcwidth

.PHONY: demo real test test-peers agreement peers scaling test-machines fuzz compare check-compiled \
	bench gpu lint notebooks check-notebooks timings student-release quiz slides site site-test weights \
	lab clean

demo: $(READY)  ## the mini Flamingo on a photograph, then the kernels beside the reference
	@$(RUN) -m miniflamingo demo $(ARGS)
	@echo
	@if $(RUN) -c "import triton" 2>/dev/null; then $(RUN) -m miniflamingo compare; else echo \
	"Triton exists for Linux only: the comparison with the kernels is left out here."; fi

real: $(READY)  ## a Flamingo of real parts, fetched (440 MB); ARGS=table: its committed figures
	@$(RUN) -m miniflamingo real $(ARGS)

test: $(READY)  ## all tests, on two cores; those that need a GPU skip where there is none
	@$(RUN) -m pytest -n 2 --dist loadfile $(ARGS)

test-peers: peers  ## tests against other projects' own code, installed beside, in out/peers
	@PYTHONPATH=out/peers $(RUN) -m pytest tests/interop $(ARGS)

agreement: peers  ## by how much ours and theirs differ, as a table; ARGS="--json FILE"
	@PYTHONPATH=out/peers $(RUN) -m tests.interop $(ARGS)

scaling: peers  ## time and memory against length, images, shots, beside public blocks; ARGS=--full
	@PYTHONPATH=out/peers $(RUN) -m miniflamingo scaling $(ARGS)

peers: $(READY)
	@$(RUN) -m pip install -q --upgrade --no-deps --target out/peers $(PEERS)

test-machines: $(READY)  ## tests and course as other processors run them; ARGS="--turn 1/4": a part
	@$(RUN) -m tests.machines $(ARGS)

fuzz: $(READY)  ## damaged files, absurd options; ARGS="--minutes 5 --seed 123", ARGS=kills
	@$(RUN) -m tests.fuzz $(ARGS)

compare: $(READY)  ## every kernel beside its NumPy twin
	@$(RUN) -m miniflamingo compare $(ARGS)

check-compiled: $(READY)  ## compile every kernel again and compare with the committed figures
	@$(RUN) -m miniflamingo compile --check --full

bench: $(READY)  ## every kernel beside its peers; on a CPU, plain torch and NumPy alone
	@$(RUN) -m miniflamingo bench $(ARGS)

gpu:  ## on a GPU, with nothing to install: tests, then the benchmark; ARGS="--minutes 9 --out FILE"
	@$(PYTHON) -m miniflamingo gpu $(ARGS)

lint: $(READY)  ## ruff, for lint and format
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

notebooks: $(READY)  ## render the course again from its sources
	@$(RUN) -m miniflamingo.course.render $(ARGS)

check-notebooks: $(READY)  ## execute the course and compare with the committed notebooks
	@$(RUN) -m miniflamingo.course.render --check $(ARGS)

timings: $(READY)  ## measure the course's computing time; then `make notebooks`
	@$(RUN) -m miniflamingo.course.timings $(ARGS)

quiz: $(READY)  ## the quiz questions of all modules, with answers, in out/quiz.md
	@$(RUN) -m miniflamingo.course.quiz $(ARGS)

student-release: $(READY)  ## what to hand out, without solutions; ARGS=--nbgrader: its tree, too
	@$(RUN) -m miniflamingo.course.release $(ARGS)

slides: $(READY)  ## slides of the course for a browser; ARGS=06 for one module, --teacher
	@$(RUN) -m miniflamingo.course.slides $(ARGS)

site: $(SITE)  ## the course and the API reference as web pages, in out/site
	@$(RUN) -m miniflamingo.course.site.build $(ARGS)

site-test: $(SITE)  ## read the site, and run a notebook, with a browser
	@$(RUN) -m pytest tests/course/test_site.py -rs $(ARGS)

weights: $(READY)  ## train all three stages from three seeds, and replace the shipped weights
	@for seed in $(SEEDS); do $(RUN) -m miniflamingo train lm --seed $$seed --out runs/$$seed/lm && \
	$(RUN) -m miniflamingo train vision --seed $$seed --out runs/$$seed/vision && \
	$(RUN) -m miniflamingo train flamingo --seed $$seed --lm runs/$$seed/lm \
	--vision runs/$$seed/vision --out runs/$$seed/flamingo && \
	$(RUN) -m miniflamingo evaluate --checkpoint runs/$$seed/flamingo \
	--json runs/$$seed/flamingo/metrics.json || exit 1; done
	$(RUN) -m miniflamingo ship $(SEEDS:%=runs/%)

lab: $(READY)  ## JupyterLab on the course
	@$(RUN) -m jupyterlab notebooks/student

clean:  ## remove the environment that make has made; out/ and runs/ may hold yours, and stay
	@if [ -e .venv/install.log ]; then rm -rf .venv; fi
	rm -rf miniflamingo.egg-info
	@for folder in out runs; do if [ -e $$folder ]; then echo \
	"$$folder/ stays: delete it yourself, if nothing in it is worth keeping"; fi; done

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo \
	"Python 3.10 or newer is needed, '$(PYTHON)' is not: try make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into .venv, once: a few minutes on a fresh machine ..."
	@$(PYTHON) -m venv .venv || { echo \
	"'$(PYTHON) -m venv' failed: on Debian and Ubuntu, install python3-venv" >&2; exit 1; }
	@$(RUN) -m pip install --retries 2 -r requirements.txt -e . >.venv/install.log 2>&1 || { echo \
	"Installing failed (is there a network?): `grep -i error .venv/install.log | tail -n 1`" >&2; exit 1; }
	@touch $(READY)

$(SITE): $(READY) notebooks/site/requirements.txt
	@echo "Installing what the site needs into .venv, once ..."
	@$(RUN) -m pip install --retries 2 -r notebooks/site/requirements.txt >.venv/install.log 2>&1 || { echo \
	"Installing failed (is there a network?): `grep -i error .venv/install.log | tail -n 1`" >&2; exit 1; }
	@touch $(SITE)
