"""stub"""
def can_attend(query, rule):
    return False
def attend(step, layer, query, rule):
    raise AssertionError
