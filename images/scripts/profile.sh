# Read by login shells (/etc/profile.d) and by interactive ones (/etc/bash.bashrc).
# A login shell starts from the distribution's PATH; this brings the image's back, with what `pip install` put below
# PYTHONUSERBASE in front.
PATH=@PATH@
if [ -n "${PYTHONUSERBASE-}" ]; then
    PATH=$PYTHONUSERBASE/bin:$PATH
fi
export PATH
