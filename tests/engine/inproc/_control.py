from tests.engine.inproc.test_request_kinds import pin_nothing as pin
def no_rule():
    pin()
    from pascal_sglang.engine.lora_slots import LoraSlots
    LoraSlots.take = lambda *a: True
    LoraSlots.fits = lambda *a: True
