# PersonaChat's 7,801 validation replies, beside the published marks: python evaluate.py config/eval_convai2.py
# First: python prepare/personachat.py, which fetches the archive. The marks were published for ConvAI2's edition of it
#   (http://parl.ai/downloads/convai2/convai2_fix_723.tgz, 430 MB; its test set is hidden): give that as --convai2.
convai2 = "data/downloads/personachat.tgz"
dataset = ""
probes = 0
