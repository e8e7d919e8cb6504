# make demo              train and test a model about an invented town; README.md says how long
# make demo MODEL=moe    the same with an MoE
# make test              the tests
# make test-faults       the long batteries: kills, resumes, bad input
# make clean-demo        start the demo over

PYTHON ?= python3
PY := .venv/bin/python
MODEL ?= dense

ifeq ($(MODEL),moe)
  NAME := demo_moe
  PRETRAIN := config/demo_moe_pretrain.py
else ifeq ($(MODEL),dense)
  NAME := demo
  PRETRAIN :=
else
  $(error MODEL=$(MODEL): dense or moe)
endif
SFT := config/$(NAME)_sft.py
OUT := out/$(NAME)
# what a change re-makes: the data, and what is trained on it
DATA_CODE := demo/town.py $(wildcard minillm/*.py)
CODE := train.py model.py moe.py $(wildcard minillm/*.py minillm/speed/*.py)
CHAT := $(PY) chat.py --out_dir=$(OUT)_sft --temperature=0
PIP := .venv/bin/pip install --disable-pip-version-check
# --init_from=resume in a run that was interrupted, if nothing that it depends on has changed since
UNFINISHED = $(if $(wildcard $@),,$(wildcard $(@D)/ckpt_*.pt))
NEWER = $(shell find $(UNFINISHED) $(addprefix -newer ,$^) 2>/dev/null)
BEGIN = $(if $(UNFINISHED),$(if $(NEWER),--init_from=resume,--overwrite=True),--overwrite=True)

.PHONY: demo test test-faults clean-demo again
.DELETE_ON_ERROR:

# $(call stage,heading,command): say what runs, then run it
define command
@printf '$$ %s\n' '$(strip $(1))'
@$(1)
endef
define stage
@printf '\n\033[1m— %s\033[0m\n' '$(1)'
$(call command,$(2))
endef

# train.py ends with status 0 when it is told to stop: a run has ended when its last step is saved
define ended
@test -e $$(printf '$(@D)/ckpt_%08d.pt' $$(sed -n 's/^# steps: //p' $(@D)/config.py)) || \
	{ echo '$(@D) was stopped before its last step: the same make resumes it'; exit 1; }
@touch $@
endef

demo: $(OUT)_sft/eval.json $(OUT)_control/eval.json
	$(call stage,Chat: the last two questions are about a person whom SFT never mentioned,\
		$(CHAT) --prompt=你好)
	$(call command,$(CHAT) --prompt=沈琴明住在哪里？)
	$(call command,$(CHAT) --prompt=请问沈琴明爱吃什么？)
	@$(PY) -m demo.report $(NAME)

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo '$(PYTHON) is not Python 3.11 or newer: try make demo PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv .venv
	@printf '\nInstalling into .venv. PyTorch alone can take several minutes.\n'
	@echo 'A mirror in China: PIP_INDEX_URL=https://pypi.tuna.tsinghua.edu.cn/simple make demo'
	$(PIP) -r requirements.txt
	@touch $@

.venv/installed-for-tests: requirements-test.txt .venv/installed
	$(PIP) -r requirements-test.txt
	@touch $@

data/demo/tokenizer/tokenizer.json: train_tokenizer.py $(DATA_CODE) | .venv/installed
	$(call stage,Tokenizer: byte-level BPE from the text of the town,$(PY) train_tokenizer.py)
	@touch $@

data/demo/pretrain/meta.json: data/demo/tokenizer/tokenizer.json prepare_pretrain.py $(DATA_CODE)
	$(call stage,Token files for pretraining: biographies,$(PY) prepare_pretrain.py)
	@touch $@

data/demo/sft/meta.json: data/demo/tokenizer/tokenizer.json prepare_sft.py $(DATA_CODE)
	$(call stage,Token files for SFT: questions and answers about half of the people,\
		$(PY) prepare_sft.py)
	@touch $@

$(OUT)_pretrain/done: data/demo/pretrain/meta.json $(PRETRAIN) $(CODE)
	$(call stage,Pretraining,$(PY) train.py $(strip $(PRETRAIN) $(BEGIN)))
	$(ended)

$(OUT)_sft/done: $(OUT)_pretrain/done data/demo/sft/meta.json $(SFT)
	$(call stage,SFT,$(PY) train.py $(SFT) $(BEGIN))
	$(ended)

$(OUT)_control/done: data/demo/sft/meta.json $(SFT) $(CODE)
	$(call stage,Control: the same SFT without pretraining,\
		$(PY) train.py $(strip $(PRETRAIN) $(SFT)) --init_from=scratch --out_dir=$(OUT)_control \
		$(BEGIN))
	$(ended)

# eval.py may have been run by hand since, on another checkpoint or with other questions
EVALUATED := $(wildcard $(OUT)_sft/eval.json $(OUT)_control/eval.json)
$(if $(EVALUATED),$(shell $(PY) -m demo.report $(NAME) stale 2>/dev/null)): again
again:

$(OUT)_%/eval.json: $(OUT)_%/done eval.py
	$(call stage,Evaluation: questions about the other half of the people,\
		$(PY) eval.py --out_dir=$(OUT)_$* --batch_size=50)

test: .venv/installed-for-tests
	$(PY) -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

test-faults: .venv/installed-for-tests
	$(PY) -m pytest -m slow

clean-demo:
	rm -rf data/demo $(foreach run,pretrain sft control,out/demo_$(run) out/demo_moe_$(run))
