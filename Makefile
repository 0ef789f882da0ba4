# The targets stand in the order in which data flows:
#   checkpoint ──▶ onnx ──▶ fp8 ──▶ engines ──▶ gate ──▶ repository ──▶ serve ◀── generate
# Each is remade only when what it was made from has changed; the stages say why.

# a checkpoint's folder, a hub id, or "miniature"
MODEL ?= miniature
# auto, hopper, ada, cpu, or a compute capability such as sm86
TARGET ?= auto
# of the MMDiT: fp8 or fp16
PRECISION ?= fp8
# the sizes served: square-1024 (the default of SD3.5), square-512, buckets-1mp, any-256-1536
SHAPES ?=
# more of `python -m engines build`, such as --workspace-gib 20
ENGINE_OPTIONS ?=
# more of `python -m measure reference`, such as --model medium --size 512x512
REFERENCE_OPTIONS ?=
# 1: package FP8 engines whose quality gate failed or was not run, and say so in the manifest
ACCEPT_QUALITY ?=
# tables of what calls take by their rows, as `make gpu-check` measures them, separated by spaces: calls of about their
# sizes are then shared only where it pays. What is not given to the next `make repository` is left out again
STEP_TIMES ?=
# 1: answer a request that was answered before from Triton's response cache; a seed is then required
CACHE_PICTURES ?=
# of the text encoders' answers and of such pictures: local, local:MIB or redis://HOST:PORT
CACHE ?= local
# what runs gets to finish once the server is told to stop
GRACE_SECONDS ?= 30
# more of `python -m export onnx` and `fp8`, such as --scan-batch 1 and --calibration-batch 2; what was given once
# must be given to later commands too, or they remake it with the defaults
ONNX_OPTIONS ?=
FP8_OPTIONS ?=
# 3.11 or 3.12, on Linux x86-64
PYTHON ?= python3

HOST ?= 127.0.0.1
GRPC_PORT ?= 8001
HTTP_PORT ?= 8000
METRICS_PORT ?= 8002
PROMPT ?= a large red circle on a white background
OUT ?= picture.png
URL ?= localhost:$(GRPC_PORT)
# of training, at most
MINUTES ?= 75

ifeq ($(filter fp8 fp16,$(PRECISION)),)
$(error PRECISION=$(PRECISION) is unknown: expected fp8 or fp16)
endif

# GPUs before sm89 have no FP8
ifneq ($(filter sm5% sm6% sm7% sm80 sm86 sm87,$(TARGET)),)
override PRECISION := fp16
endif

SHELL := bash
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python
# A variable as one word of the shell, as it was given: neither make nor the shell expands what is in it.
quoted = '$(subst ','\'',$(value $(1)))'
MODEL_AND_TARGET = --model $(call quoted,MODEL) --target $(call quoted,TARGET)
CHOSEN = $(MODEL_AND_TARGET) --precision $(PRECISION)
ENGINE = $(call given,SHAPES,shapes) $(ENGINE_OPTIONS)
# of the quality gate, passed on only when they are given
GATE = $(call given,PROFILE,profile) $(call given,PROMPTS,prompts) $(call given,COUNT,count)
# FP8 is packaged once its gate is passed, or without it when that was asked for by name
PACKAGED = $(if $(ACCEPT_QUALITY),--accept-quality) $(if $(CACHE_PICTURES),--cache-pictures) \
	$(patsubst %,--step-times='%',$(subst ','\'',$(value STEP_TIMES)))
JUDGED = $(if $(filter fp8,$(PRECISION)),$(if $(ACCEPT_QUALITY),engines,gate),engines)
# variables of a request, passed on only when they are given
given = $(if $(value $(1)),--$(2)=$(call quoted,$(1)))
# the same of one that has a default here
asked = $(if $(filter file,$(origin $(1))),,--$(2)=$(call quoted,$(1)))
REQUEST = $(call given,NEGATIVE_PROMPT,negative-prompt) $(call given,SEED,seed) \
	$(call given,STEPS,steps) $(call given,GUIDANCE_SCALE,guidance-scale) \
	$(call given,GUIDANCE_START,guidance-start) $(call given,GUIDANCE_END,guidance-end) \
	$(call given,HEIGHT,height) $(call given,WIDTH,width)

.DEFAULT_GOAL := help
.PHONY: help demo setup forecast target onnx fp8 sensitivity engines refit both-engines gate report repository serve generate \
	evaluate bench load gpu-reference gpu-check train test test-fast lint clean

demo: $(JUDGED) ## the miniature, from checkpoint to pictures through Triton, with a GPU or without
	@$(RUN) -m serve demo $(CHOSEN) $(PACKAGED) $(call asked,PROMPT,prompt) $(call asked,OUT,out) $(REQUEST)

setup: $(READY) ## install what everything needs into .venv (the other targets do it by themselves)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import platform, sys; ok = sys.version_info[:2] in ((3, 11), (3, 12)) and \
	(platform.system(), platform.machine()) == ("Linux", "x86_64"); \
	ok or sys.exit("error: mmdit-trt needs Linux x86-64 and Python 3.11 or 3.12, found %s %s, Python %s; \
	choose another with PYTHON=…" % (platform.system(), platform.machine(), platform.python_version()))'
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt pip
	@torch=$$(grep '^torch==' constraints.txt); \
	if $(RUN) -m pip install -q --dry-run --no-deps "$$torch+cpu" >/dev/null 2>&1; \
	then echo "setting up $(VENV): downloads about 0.5 GB, takes 2.0 GB of disk"; \
	else echo "setting up $(VENV): downloads several GB, since the package index has torch with CUDA only;" \
	"with PyTorch's CPU index in PIP_EXTRA_INDEX_URL it is 0.5 GB"; fi
	@set -o pipefail; $(RUN) -m pip install -c constraints.txt --group all 2>$(VENV)/setup.err \
	| awk '/^(Collecting|Processing)/ && ++n % 10 == 0 { print "  " n " packages"; fflush() } \
	/^Installing collected/ { print "  installing " n " packages"; fflush() }' \
	|| { grep -v '^WARNING' $(VENV)/setup.err | tail -n 5 >&2; exit 1; }
	@touch $(READY)

forecast: $(READY) ## what fits which GPU, and lower bounds per step, before anything is built: of SD3.5, or MODEL=
	@$(RUN) -m engines forecast $(call asked,MODEL,model)

# before hours of export: refuse a target that this machine cannot build, unless `engines` alone is asked for
target: $(READY)
	@$(RUN) -m engines build $(CHOSEN) $(call given,SHAPES,shapes) \
	--check $(if $(filter-out engines,$(MAKECMDGOALS)),here,known) >/dev/null

onnx: $(READY) ## MODEL's checkpoint to one FP16 ONNX file per component
	@$(RUN) -m export onnx --model $(call quoted,MODEL) $(ONNX_OPTIONS)

fp8: onnx ## calibrate, and the MMDiT to FP8 ONNX with its audit: POLICY= CALIBRATION=
	@$(RUN) -m export fp8 $(MODEL_AND_TARGET) $(call given,POLICY,policy) $(call given,CALIBRATION,calibration) \
	$(FP8_OPTIONS)

sensitivity: onnx ## rank groups of layers by what FP8 does to them; BUDGET=0.99 proposes a policy: BY= POLICY=
	@$(RUN) -m export sensitivity $(MODEL_AND_TARGET) $(call given,BY,by) $(call given,BUDGET,budget) \
	$(call given,POLICY,policy) $(FP8_OPTIONS)

engines: target $(if $(filter fp16,$(PRECISION)),onnx,fp8) ## ONNX to one engine per component, for TARGET: SHAPES= ENGINE_OPTIONS=
	@$(RUN) -m engines build $(CHOSEN) $(ENGINE)

refit: $(READY) ## put the weights back into plans built with ENGINE_OPTIONS=--strip, on the GPU's machine
	@$(RUN) -m engines refit $(CHOSEN)

gate: both-engines ## FP8's pictures against FP16's, with a verdict: PROFILE= PROMPTS= COUNT=
	@$(if $(filter fp8,$(PRECISION)),$(RUN) -m quality gate $(MODEL_AND_TARGET) $(GATE))

report: both-engines ## one page about FP8, whatever the gate's verdict: pictures, errors, layers, sizes
	@$(if $(filter fp8,$(PRECISION)),$(RUN) -m quality gate $(MODEL_AND_TARGET) $(GATE) --report-only)
	@$(if $(filter fp8,$(PRECISION)),$(RUN) -m quality report $(MODEL_AND_TARGET))

both-engines: engines # FP8 is judged beside FP16
	@$(if $(filter fp8,$(PRECISION)),set -o pipefail; \
	$(RUN) -m engines build $(MODEL_AND_TARGET) --precision fp16 $(ENGINE) | sed -un '/: building/p')

repository: $(JUDGED) ## engines to a Triton model repository, for FP8 once the gate is passed (or ACCEPT_QUALITY=1): STEP_TIMES= CACHE_PICTURES=
	@$(RUN) -m serve package $(CHOSEN) $(PACKAGED)

serve: $(READY) ## a Triton server over it, until Ctrl-C: HOST= GRPC_PORT= HTTP_PORT= METRICS_PORT= CACHE= GRACE_SECONDS=
	@exec $(RUN) -m serve launch $(CHOSEN) --host $(call quoted,HOST) --cache $(call quoted,CACHE) --grace-seconds $(GRACE_SECONDS) \
	--grpc-port $(GRPC_PORT) --http-port $(HTTP_PORT) --metrics-port $(METRICS_PORT)

generate: $(READY) ## a picture from the server at URL: PROMPT= NEGATIVE_PROMPT= SEED= STEPS= GUIDANCE_SCALE= GUIDANCE_START= GUIDANCE_END= HEIGHT= WIDTH= TIMEOUT= PRIORITY_LEVEL= OUT=
	@$(RUN) -m serve generate $(REQUEST) $(call given,TIMEOUT,timeout) \
	$(call given,PRIORITY_LEVEL,priority-level) --url $(URL) --out $(call quoted,OUT) -- $(call quoted,PROMPT)

evaluate: $(READY) ## score the miniature's served pictures of 200 captions in FP16 and FP8, with a page of them
	@$(MAKE) --no-print-directory repository MODEL=miniature PRECISION=fp16
	@$(MAKE) --no-print-directory repository MODEL=miniature PRECISION=fp8 ACCEPT_QUALITY=1
	@$(RUN) -m miniature evaluate --target $(call quoted,TARGET)

bench: $(READY) ## all benchmarks, each beside its peer, into docs/benchmarks: an hour on an idle machine
	@$(MAKE) --no-print-directory repository MODEL=miniature TARGET=cpu PRECISION=fp16
	@$(MAKE) --no-print-directory repository MODEL=miniature TARGET=cpu PRECISION=fp8 ACCEPT_QUALITY=1
	@for each in scheduling real_scheduling step_cost lone serving guidance; do \
	$(RUN) -m bench.$$each --out docs/benchmarks || exit; done

load: $(READY) ## 2,000 mixed requests by 16 clients against the miniature's server: every answer is checked
	@$(MAKE) --no-print-directory repository MODEL=miniature TARGET=cpu PRECISION=fp16
	@$(RUN) -m bench.load --requests 2000 --clients 16

gpu-reference: $(READY) ## torch's milliseconds per step on this machine's GPU, a floor for TensorRT: REFERENCE_OPTIONS=
	@$(RUN) -m measure reference $(REFERENCE_OPTIONS)

gpu-check: $(READY) ## on a GPU with TensorRT: build, judge, compare and time MODEL's engines, FP16 and FP8: POLICY= SHAPES= PROFILE= PROMPTS= COUNT=
	@$(RUN) -m measure check $(MODEL_AND_TARGET) $(call given,SHAPES,shapes) $(call given,POLICY,policy) \
	$(call given,ONNX_OPTIONS,onnx-options) $(call given,FP8_OPTIONS,fp8-options) \
	$(call given,CALIBRATION,calibration) $(call given,ENGINE_OPTIONS,engine-options) $(GATE)

train: $(READY) ## train the miniature for MINUTES, from where it stopped, in training/
	@$(RUN) -m miniature train --minutes $(MINUTES)

test: $(READY) ## the tests, on two cores
	@$(RUN) tests/halves.py

test-fast: $(READY) ## those that need no server, no training and no process of their own: two minutes
	@$(RUN) tests/halves.py -m "not slow"

lint: $(READY) ## format, lint and types
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

clean: ## remove everything that was made, but not .venv and training/
	rm -rf build

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "make %-14s %s\n", $$1, $$2}'
	@echo; echo "MODEL=$(MODEL)  TARGET=$(TARGET)  PRECISION=$(PRECISION)  SHAPES=$(SHAPES)"
