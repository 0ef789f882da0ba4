# The targets stand in the order in which data flows:
#   checkpoint ──▶ onnx ──▶ fp8 ──▶ engines ──▶ repository ──▶ serve ◀── generate
# Each is remade only when what it was made from has changed; the stages say why.

MODEL     ?= miniature#                  a checkpoint's folder, a hub id, or "miniature"
TARGET    ?= auto#                       auto, hopper, ada or cpu
PRECISION ?= fp8#                        of the MMDiT: fp8 or fp16
PYTHON    ?= python3#                    3.11 or 3.12, Linux x86-64

GRPC_PORT ?= 8001
HTTP_PORT ?= 8000
METRICS_PORT ?= 8002
PROMPT    ?= a red square on a blue background
OUT       ?= picture.png
URL       ?= localhost:$(GRPC_PORT)

MODEL := $(strip $(MODEL))
TARGET := $(strip $(TARGET))
PRECISION := $(strip $(PRECISION))
PYTHON := $(strip $(PYTHON))
SHELL := bash
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python
MINIATURE := build/miniature/checkpoint/miniature.json
CHOSEN = --model '$(MODEL)' --target '$(TARGET)' --precision '$(PRECISION)'
# variables of a request, passed on only when they are given
REQUEST = $(if $(NEGATIVE_PROMPT),--negative-prompt '$(subst ','\'',$(NEGATIVE_PROMPT))') \
	$(if $(SEED),--seed '$(SEED)') $(if $(STEPS),--steps '$(STEPS)') \
	$(if $(GUIDANCE_SCALE),--guidance-scale '$(GUIDANCE_SCALE)') \
	$(if $(HEIGHT),--height '$(HEIGHT)') $(if $(WIDTH),--width '$(WIDTH)')
QUOTED_PROMPT = '$(subst ','\'',$(PROMPT))'

.DEFAULT_GOAL := help
.PHONY: help demo setup checkpoint onnx fp8 engines repository serve generate test lint clean

demo: engines ## the miniature, from checkpoint to a picture through Triton, on any machine
	@$(RUN) -m serve demo $(CHOSEN) --prompt $(QUOTED_PROMPT) $(REQUEST)

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

checkpoint: $(READY) $(if $(filter miniature,$(MODEL)),$(MINIATURE)) ## make the miniature's checkpoint

$(MINIATURE): $(wildcard miniature/*.py) | $(READY)
	@$(RUN) -m miniature --output $(dir $(MINIATURE))

onnx: checkpoint ## MODEL's checkpoint to one FP16 ONNX file per component
	@$(RUN) -m export onnx --model '$(MODEL)'

fp8: onnx ## calibrate, and the MMDiT to FP8 ONNX
	@$(RUN) -m export fp8 --model '$(MODEL)'

engines: $(if $(filter fp16,$(PRECISION)),onnx,fp8) ## ONNX to one engine per component, for TARGET
	@$(RUN) -m engines $(CHOSEN)

repository: engines ## engines to a Triton model repository
	@$(RUN) -m serve package $(CHOSEN)

serve: repository ## a Triton server over it, until Ctrl-C
	@exec $(RUN) -m serve launch $(CHOSEN) \
	--grpc-port $(GRPC_PORT) --http-port $(HTTP_PORT) --metrics-port $(METRICS_PORT)

generate: $(READY) ## ask the server at URL for a picture: PROMPT= OUT= SEED= STEPS= GUIDANCE_SCALE= HEIGHT= WIDTH=
	@$(RUN) -m serve generate $(QUOTED_PROMPT) --url '$(URL)' --out '$(OUT)' $(REQUEST)

test: $(READY) ## the tests
	@$(RUN) -m pytest

lint: $(READY) ## format, lint and types
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

clean: ## remove everything that was made, but not .venv
	rm -rf build

help: ## this list
	@grep -hE '^[a-z0-9]+:.*##' Makefile | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "make %-12s %s\n", $$1, $$2}'
	@echo; echo "MODEL=$(MODEL)  TARGET=$(TARGET)  PRECISION=$(PRECISION)"
