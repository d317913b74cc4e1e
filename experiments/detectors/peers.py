def said(result):
    return {}
