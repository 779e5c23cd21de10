"""JSON Schema's formats of strings, as patterns that match them alone, if not all of them."""

_LONG_MONTHS = r"(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
_SHORT_MONTHS = r"(0[469]|11)-(0[1-9]|[12][0-9]|30)"
_FEBRUARY = r"02-(0[1-9]|1[0-9]|2[0-8])"
_LEAP_YEAR = r"([1-9][0-9](0[48]|[2468][048]|[13579][26])|([2468][048]|[13579][26])00)"
_DAY = rf"({_LONG_MONTHS}|{_SHORT_MONTHS}|{_FEBRUARY})"
_DATE = rf"([1-9][0-9]{{3}}-{_DAY}|{_LEAP_YEAR}-02-29)"  # of years with four digits
_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](Z|[+\-]{_CLOCK})"  # of whole seconds
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_WORD = r"[A-Za-z0-9][A-Za-z0-9_+\-]{0,31}"
_HEX = "[0-9a-f]"

FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "ipv4": rf"^({_BYTE}\.){{3}}{_BYTE}$",
    "uuid": f"^{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}$",
    "email": rf"^({_WORD}\.){{0,2}}{_WORD}@([a-z0-9][a-z0-9\-]{{0,31}}\.){{1,3}}[a-z]{{2,12}}$",
}
