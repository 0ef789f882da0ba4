# Targets, in the order in which data flows:
#   checkpoint ──▶ onnx ──▶ fp8 ──▶ engines ──▶ gate ──▶ repository ──▶ serve ◀── generate
# A stage runs again only if its inputs changed, and prints which.

# checkpoint folder, hub id, or "miniature"
MODEL ?= miniature
# auto, hopper, ada, cpu, or a compute capability such as sm86
TARGET ?= auto
# precision of the MMDiT: fp8 or fp16
PRECISION ?= fp8
# sizes to serve: square-1024 (default for SD3.5), square-512, buckets-1mp, any-256-1536
SHAPES ?=
# extra options for `python -m engines build`, such as --workspace-gib 20
ENGINE_OPTIONS ?=
# extra options for `python -m measure reference`, such as --model medium --size 512x512
REFERENCE_OPTIONS ?=
# 1: package FP8 engines even if the quality gate failed or was not run; the manifest records it
ACCEPT_QUALITY ?=
# tables of rows → milliseconds from `make gpu-check`, separated by spaces: the scheduler then batches calls of about
# these sizes only when it raises throughput. Give them to every `make repository`, otherwise they are left out
STEP_TIMES ?=
# 1: return repeated requests from Triton's response cache; a seed is then required
CACHE_PICTURES ?=
# response cache for text and pictures: local, local:MIB or redis://HOST:PORT
CACHE ?= local
# seconds that in-flight requests have to finish when the server stops
GRACE_SECONDS ?= 30
# extra options for `python -m export onnx` and `fp8`, such as --scan-batch 1 and --calibration-batch 2. Give them to
# later commands too, otherwise those rebuild with the defaults
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
# time limit of `make train`
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
# A variable as one shell word, verbatim: neither make nor the shell expands it.
quoted = '$(subst ','\'',$(value $(1)))'
MODEL_AND_TARGET = --model $(call quoted,MODEL) --target $(call quoted,TARGET)
CHOSEN = $(MODEL_AND_TARGET) --precision $(PRECISION)
ENGINE = $(call given,SHAPES,shapes) $(ENGINE_OPTIONS)
# options of the quality gate, passed on only if given
GATE = $(call given,PROFILE,profile) $(call given,PROMPTS,prompts) $(call given,COUNT,count)
# FP8 is packaged only after it passes the gate, unless ACCEPT_QUALITY=1
PACKAGED = $(if $(ACCEPT_QUALITY),--accept-quality) $(if $(CACHE_PICTURES),--cache-pictures) \
	$(patsubst %,--step-times='%',$(subst ','\'',$(value STEP_TIMES)))
JUDGED = $(if $(filter fp8,$(PRECISION)),$(if $(ACCEPT_QUALITY),engines,gate),engines)
# variables of a request, passed on only if given
given = $(if $(value $(1)),--$(2)=$(call quoted,$(1)))
# the same for a variable that has a default here
asked = $(if $(filter file,$(origin $(1))),,--$(2)=$(call quoted,$(1)))
REQUEST = $(call given,NEGATIVE_PROMPT,negative-prompt) $(call given,SEED,seed) \
	$(call given,STEPS,steps) $(call given,GUIDANCE_SCALE,guidance-scale) \
	$(call given,GUIDANCE_START,guidance-start) $(call given,GUIDANCE_END,guidance-end) \
	$(call given,HEIGHT,height) $(call given,WIDTH,width)

.DEFAULT_GOAL := help
.PHONY: help demo setup forecast target onnx fp8 sensitivity engines refit both-engines gate report repository serve generate \
	evaluate bench load gpu-reference gpu-check train test test-fast lint clean

demo: $(JUDGED) ## miniature SD3.5: export, FP8, quality gate, Triton server, eight pictures; no GPU needed
	@$(RUN) -m serve demo $(CHOSEN) $(PACKAGED) $(call asked,PROMPT,prompt) $(call asked,OUT,out) $(REQUEST)

setup: $(READY) ## install all dependencies into .venv (other targets do this automatically)

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

forecast: $(READY) ## compute which GPUs fit the engines, and lower bounds per step: for SD3.5, or MODEL=
	@$(RUN) -m engines forecast $(call asked,MODEL,model)

# Before hours of export, refuse a target that this machine cannot build, unless only `engines` is requested.
target: $(READY)
	@$(RUN) -m engines build $(CHOSEN) $(call given,SHAPES,shapes) \
	--check $(if $(filter-out engines,$(MAKECMDGOALS)),here,known) >/dev/null

onnx: $(READY) ## export MODEL to one FP16 ONNX file per component: ONNX_OPTIONS=
	@$(RUN) -m export onnx --model $(call quoted,MODEL) $(ONNX_OPTIONS)

fp8: onnx ## calibrate and quantize the MMDiT to FP8 ONNX, with an audit: POLICY= CALIBRATION= FP8_OPTIONS=
	@$(RUN) -m export fp8 $(MODEL_AND_TARGET) $(call given,POLICY,policy) $(call given,CALIBRATION,calibration) \
	$(FP8_OPTIONS)

sensitivity: onnx ## rank layer groups by FP8 damage; BUDGET=0.99 proposes a policy for that SSIM: BY= POLICY=
	@$(RUN) -m export sensitivity $(MODEL_AND_TARGET) $(call given,BY,by) $(call given,BUDGET,budget) \
	$(call given,POLICY,policy) $(FP8_OPTIONS)

engines: target $(if $(filter fp16,$(PRECISION)),onnx,fp8) ## check the ONNX files and build one engine per component for TARGET: SHAPES= ENGINE_OPTIONS=
	@$(RUN) -m engines build $(CHOSEN) $(ENGINE)

refit: $(READY) ## restore the weights of plans built with ENGINE_OPTIONS=--strip; run on the GPU machine
	@$(RUN) -m engines refit $(CHOSEN)

gate: both-engines ## compare FP8 pictures with FP16 pictures and give a verdict: PROFILE= PROMPTS= COUNT=
	@$(if $(filter fp8,$(PRECISION)),$(RUN) -m quality gate $(MODEL_AND_TARGET) $(GATE))

report: both-engines ## write one page about FP8, even if the gate failed: pictures, errors, layers, sizes
	@$(if $(filter fp8,$(PRECISION)),$(RUN) -m quality gate $(MODEL_AND_TARGET) $(GATE) --report-only)
	@$(if $(filter fp8,$(PRECISION)),$(RUN) -m quality report $(MODEL_AND_TARGET))

both-engines: engines # the gate needs FP16 engines as its baseline
	@$(if $(filter fp8,$(PRECISION)),set -o pipefail; \
	$(RUN) -m engines build $(MODEL_AND_TARGET) --precision fp16 $(ENGINE) | sed -un '/: building/p')

repository: $(JUDGED) ## package the engines as a Triton model repository; FP8 must pass the gate (or ACCEPT_QUALITY=1): STEP_TIMES= CACHE_PICTURES=
	@$(RUN) -m serve package $(CHOSEN) $(PACKAGED)

serve: $(READY) ## run a Triton server on the repository until Ctrl-C: HOST= GRPC_PORT= HTTP_PORT= METRICS_PORT= CACHE= GRACE_SECONDS=
	@exec $(RUN) -m serve launch $(CHOSEN) --host $(call quoted,HOST) --cache $(call quoted,CACHE) --grace-seconds $(GRACE_SECONDS) \
	--grpc-port $(GRPC_PORT) --http-port $(HTTP_PORT) --metrics-port $(METRICS_PORT)

generate: $(READY) ## request one picture from the server at URL: PROMPT= NEGATIVE_PROMPT= SEED= STEPS= GUIDANCE_SCALE= GUIDANCE_START= GUIDANCE_END= HEIGHT= WIDTH= TIMEOUT= PRIORITY_LEVEL= OUT=
	@$(RUN) -m serve generate $(REQUEST) $(call given,TIMEOUT,timeout) \
	$(call given,PRIORITY_LEVEL,priority-level) --url $(URL) --out $(call quoted,OUT) -- $(call quoted,PROMPT)

evaluate: $(READY) ## score 200 served pictures of the miniature in FP16 and in FP8, and write a page of them
	@$(MAKE) --no-print-directory repository MODEL=miniature PRECISION=fp16
	@$(MAKE) --no-print-directory repository MODEL=miniature PRECISION=fp8 ACCEPT_QUALITY=1
	@$(RUN) -m miniature evaluate --target $(call quoted,TARGET)

bench: $(READY) ## run all benchmarks next to their peers, into docs/benchmarks: an hour on an idle machine
	@$(MAKE) --no-print-directory repository MODEL=miniature TARGET=cpu PRECISION=fp16
	@$(MAKE) --no-print-directory repository MODEL=miniature TARGET=cpu PRECISION=fp8 ACCEPT_QUALITY=1
	@for each in scheduling real_scheduling step_cost lone serving guidance; do \
	$(RUN) -m bench.$$each --out docs/benchmarks || exit; done

load: $(READY) ## send 2,000 mixed requests from 16 clients to the miniature's server and check every answer
	@$(MAKE) --no-print-directory repository MODEL=miniature TARGET=cpu PRECISION=fp16
	@$(RUN) -m bench.load --requests 2000 --clients 16

gpu-reference: $(READY) ## time PyTorch per step on this machine's GPU, as a reference for TensorRT: REFERENCE_OPTIONS=
	@$(RUN) -m measure reference $(REFERENCE_OPTIONS)

gpu-check: $(READY) ## on a GPU with TensorRT: build, judge, compare and time MODEL's FP16 and FP8 engines: POLICY= SHAPES= PROFILE= PROMPTS= COUNT=
	@$(RUN) -m measure check $(MODEL_AND_TARGET) $(call given,SHAPES,shapes) $(call given,POLICY,policy) \
	$(call given,ONNX_OPTIONS,onnx-options) $(call given,FP8_OPTIONS,fp8-options) \
	$(call given,CALIBRATION,calibration) $(call given,ENGINE_OPTIONS,engine-options) $(GATE)

train: $(READY) ## train the miniature for MINUTES in training/; resumes where it stopped
	@$(RUN) -m miniature train --minutes $(MINUTES)

test: $(READY) ## run all tests, on two cores
	@$(RUN) tests/halves.py

test-fast: $(READY) ## run the tests that need no server, training or subprocess: four minutes
	@$(RUN) tests/halves.py -m "not slow"

lint: $(READY) ## check format, lint and types
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

clean: ## remove build/; keeps .venv and training/
	rm -rf build

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "make %-14s %s\n", $$1, $$2}'
	@echo; echo "MODEL=$(MODEL)  TARGET=$(TARGET)  PRECISION=$(PRECISION)  SHAPES=$(SHAPES)"
