"""The name COMCAT among PEFT's methods.

`PeftType` is a closed enum and PEFT has no hook for methods that live elsewhere, so the enum gets one more member:
the smallest extension that PEFT, diffusers and transformers (which reads `peft_type.value`) all understand.
"""

from peft.utils import PeftType


def _extended(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType.__members__)
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


COMCAT = _extended("COMCAT")
