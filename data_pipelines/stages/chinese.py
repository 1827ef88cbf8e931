"""Chinese web text: what a page says around its text, pages without text, and simplified or traditional script.

Boilerplate is found line by line. A line is boilerplate if it is small print (copyright, the ICP number that pages in
China have to show, cookies, what a forum says to guests), if it starts as navigation does ("上一篇：…", "首页 > 新闻"),
if it is the imprint of an article or a file ("来源：… 责任编辑：…"), or if most of its words are labels of a page
("登录 | 注册 | 首页"). Small print aside, a line with a full stop is never boilerplate: "请点击右上角的“登录”按钮。" is
a sentence of a manual. Such lines, and "详情点击>>" at the end of one, are taken out as C4 does it (C. Raffel et al.,
arXiv 1910.10683); of a page with too much of them the rest is not worth having. Lists find what they list: of 30 lines
of furniture on real pages that they were not made from, half were found; of 31 lines of text there, none was taken.

Shares and lengths: min_han and min_line_chars are those of ChineseWebText (J. Chen et al., arXiv 2311.01149,
preprocess.py of CASIA-LM/ChineseWebText, which also wants 200 characters: `min_chars` of the filter). min_sentences is
ours, in place of FineWeb's share of lines that end in punctuation (arXiv 2406.17557), which Chinese headlines and
poems in lines do not: the share of Han characters that stand in lines with a mark of a sentence.

Simplified and traditional are told apart by characters that one national standard has and the other one has not:
Python's codecs of GB 2312 (2,380 characters of its own) and of the frequent half of Big5 (2,083). That needs no table
and no library, and is as good as Unihan's table of variants: of news, answers of Alpaca and of OASST cut to 50
characters, 1,449 in all, none is taken for the other script, and of the same in traditional script (by OpenCC's s2t,
s2tw and s2hk) none of 4,347, of which 3 are "mixed"; of 7,387 classical poems cut to 20 characters, which like rare
ones, 2 (benchmarks/cleaning.py). To convert is another matter: by characters alone, with Unihan's table, 0.5 % to 1.7 %
of them come out differently from OpenCC's, hence `normalise` asks for OpenCC itself.

Two kinds of damage are past mending, and such texts go: mojibake of Chinese (UTF-8 read as GBK: "涓枃"), which has
lost characters, and pages that machines made anew with the sound of characters in brackets ("轉(zhuǎn)型"), 6 of 48
pages that a search for the words of Chinese sites brought up.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from data_pipelines.errors import InputError, known_key

OPTIONS: Mapping[str, Any] = {
    "script": None,  # "simplified" or "traditional": texts of the other one, and mixed ones, go
    "min_han": 0.3,  # of the characters that are no space
    "min_line_chars": 10,  # mean
    "min_sentences": 0.5,
    "max_boilerplate": 0.3,  # of the Han characters
    "drop_lines": True,  # boilerplate of texts that stay
}

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_SENTENCE = re.compile("[。！？；…!?，,]")
_STOP = re.compile("[。！？]")
_WORD = re.compile(r"\w")

_PRINT = re.compile(  # small print and the sentences that sites put around their texts
    r"版权所有(?!权)|(?:版权|著作权)归.{0,16}所有|ICP ?[备证]|公网安备|经营许可证|违法和?不良信息举报"
    r"|不代表本(?:站|网|公司)|all rights reserved|copyright ?(?:©|\(c\)|\d{4})|^©"
    r"|(?:未经|没有).{0,12}(?:授权|许可|同意).{0,20}(?:转载|复制|使用)|转载(?:请|须|时).{0,8}(?:注明|标明|联系)"
    r"|本(?:站|网).{0,20}(?:来自|来源于|转载自)(?:网络|互联网)|由会员.{0,8}(?:分享|上传)"
    r"|本(?:网)?站.{0,8}cookies?\b|(?:接受|管理|同意).{0,6}cookies?\b"
    r"|^马上注册[,，]|^您需要 ?登[录陆] ?才(?:可以|能)|^本帖最后由 .{1,40} 编辑"
    r"|(?:注册|登[录陆]).{0,4}后(?:显示|可见|查看|下载)",
    re.IGNORECASE,
)
_START = re.compile(
    r"(?:您(?:的|现在的|当前的)|[当當]前)位置|(?:本?站|网站)?首[页頁] |[首主][页頁] ?[>»›/|-]|[上下]一[篇条页章]"
    r"|欢迎(?:来到|光临|访问)|责任编辑|责编|原标题|(?:发布|更新)(?:时间|日期)|分享(?:到|至)|扫一扫|扫码|友情链接"
    r"|长按(?:识别|二维码)|免责声明|猜你喜欢|展开全文|(?:阅读|查看)(?:全文|原文|更多|全部)|下载(?:资源|积分)|文档(?:序|编)号"
    r"|(?:相关|热门|推荐|精彩)(?:阅读|文章|推荐|新闻|链接|内容|资讯)|第 ?\d+ ?页 ?[/，,]? ?共"
    r"|点击(?:进入|下载|查看|这里|此处|关注|阅读|收藏|图片)"
)
_FIELD = re.compile(  # of the imprint of an article or a file
    r"(?:来源|作者|记者|编辑|审核|校对|出处|发布者|上传人|关键[词字]|字号|(?:发布|更新|上传)(?:时间|日期)|页数|大小|格式)[:：]"
    r"|(?:浏览|阅读|點擊|点击|查看|回复|下载|评论|人气)(?:次数|量|数|數)?[:：] ?\d"
    r"|发表于 ?\d{4}|\d+ ?(?:次(?:浏览|阅读)|金币|积分)"
)
_LABEL = re.compile(
    "全部分类|(?:QQ|微信|账号|扫码|三方|快捷|立即)?登[录陆入]|(?:免费|立即)?注[册冊]|设为首页|加入收藏|收藏本站|网站(?:地图|首页|导航)|首[页頁]"
    "|联系我们|关于我们|联系方式|友情链接|返回(?:顶部|首页|列表|上页)?|新闻中心|产品中心|公司简介|企业文化|在线(?:留言|咨询|客服)"
    "|客服(?:热线|电话)?|忘记密码|找回密码|用户名|密码|验证码|换一换|记住我|二维码|扫一扫|只需一步|快速开始|立即(?:下载|购买)|退出"
    "|我的(?:订单|购物车|收藏)|购物车|帮助中心|意见反馈|广告服务|诚聘英才|人才招聘|加入我们|法律声明|隐私(?:政策|声明)|服务条款|用户协议"
    "|手机版|电脑版|客户端|(?:免费|快捷|游客一键)?下载|微信|微博|QQ空间|公众号|分享(?:到|至)?|收藏|点赞|评论|转发|举报|回复|打印|复制链接"
    "|显示全部楼层|阅读模式|楼主|沙发|板凳|发表于|注册时间|最后登录|收起左侧|关闭(?:窗口|本页)?|字号|字体|大中小|搜索|更多|全部|相关"
    "|上一页|下一页|尾页|末页|跳转|推荐阅读|热门标签|排行榜|简体|繁体|聯絡我們|關於我們|隱私權?政策|網站地圖"
)
_TAIL = re.compile(
    r"[ \u3000]?(?:更多)?(?:详情|内容|全文)?(?:请)?点击(?:>{1,3}|》{1,2}|(?:查看|阅读)(?:全文|原文|详情|更多)>{0,3})$",
    re.MULTILINE,
)

_SPELLED = re.compile("[\u4e00-\u9fff]\\([a-z]{0,2}[āáǎàēéěèīíǐìōóǒòūúǔùǖǘǚǜ][a-z]{0,3}\\)")

_LONGEST = 100  # characters of a line that can be boilerplate


def checked(options: Any) -> dict[str, Any]:
    """The options with defaults. Raises InputError for what does not fit."""
    if not isinstance(options, Mapping):
        raise InputError(f"chinese: found {options!r}; expected its options, such as {{}}, or None")
    known_key(options, OPTIONS, "chinese: ")
    for key, value in options.items():
        if key == "script" and value not in (None, "simplified", "traditional"):
            raise InputError(f'chinese.script: found {value!r}; expected "simplified", "traditional" or None')
        if key == "drop_lines" and not isinstance(value, bool):
            raise InputError(f"chinese.drop_lines: found {value!r}; expected True or False")
        number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        if key not in ("script", "drop_lines") and not number:
            raise InputError(f"chinese.{key}: found {value!r}; expected a number, 0 or more")
    return {**OPTIONS, **options}


def han(text: str) -> int:
    return len(_HAN.findall(text))


def cleaned(text: str) -> str:
    """The text without its lines of boilerplate."""
    kept = [line for line in text.split("\n") if not is_boilerplate(line)]
    return _TAIL.sub("", "\n".join(kept))


def is_boilerplate(line: str) -> bool:
    line = line.strip(" \t\u3000·•|-—>»*#【[")
    if not line or len(line) > _LONGEST:
        return False
    if _PRINT.search(line):
        return True
    if _STOP.search(line):
        return False
    if len(line) <= _LONGEST // 2 and _START.match(line):
        return True
    fields = [field.start() for field in _FIELD.finditer(line)]
    if len(fields) > 1 or (len(line) <= _LONGEST // 2 and fields and fields[0] <= 4):
        return True
    rest, count = _LABEL.subn("", line)
    if not _WORD.search(rest):
        return count > 1 or (count == 1 and not rest.strip())
    labels = han(line) - han(rest)
    return labels >= 4 and 2 * labels >= 3 * len(_WORD.findall(rest))


def flaw(text: str, options: Mapping[str, Any]) -> tuple[str, str] | None:
    """(reason, what was found) for a text that is not worth keeping, or None. `options`: as OPTIONS."""
    characters = han(text)
    solid = len("".join(text.split()))
    if characters < options["min_han"] * solid or not characters:
        share = characters / max(solid, 1)
        return "not_chinese", f"{share:.0%} Han characters; expected {options['min_han']:.0%} or more"
    if is_mojibake(text):
        return "mojibake", "UTF-8 that was read as GBK; expected Chinese"
    spelled = len(_SPELLED.findall(text))
    if spelled > 2 and 100 * spelled > characters:
        return "spelled_out", f"{spelled} characters with their sound in brackets; expected text"
    lines = [line for line in text.split("\n") if line.strip()]
    furniture = sum(han(line) for line in lines if is_boilerplate(line)) / characters
    if furniture > options["max_boilerplate"]:
        return "boilerplate", f"{furniture:.0%} boilerplate; expected {options['max_boilerplate']:.0%} or less"
    if solid < options["min_line_chars"] * len(lines):
        found = f"lines of {solid / len(lines):.1f} characters on average"
        return "short_lines", f"{found}; expected {options['min_line_chars']} or more"
    sentences = sum(han(line) for line in lines if _SENTENCE.search(line)) / characters
    if sentences < options["min_sentences"]:
        return "no_sentences", f"{sentences:.0%} in sentences; expected {options['min_sentences']:.0%} or more"
    if options["script"] and (written := script(text)) not in (options["script"], None):
        return "chinese_script", f"{written}; expected {options['script']}"
    return None


def script(text: str) -> str | None:
    """ "simplified", "traditional", "mixed" (less than 4 in 5 of the characters that tell are of one of them), or None
    where none of them tells."""
    simplified, traditional = _telling()
    ours, theirs = len(simplified.findall(text)), len(traditional.findall(text))
    if not ours + theirs:
        return None
    if 5 * max(ours, theirs) < 4 * (ours + theirs):
        return "mixed"
    return "simplified" if ours > theirs else "traditional"


@functools.cache
def _telling() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Characters of GB 2312 that Big5 has not, and frequent ones (before row C9) of Big5 that GB 2312 has not."""
    simplified, traditional = [], []
    for character in map(chr, range(0x4E00, 0xA000)):
        mainland, taiwan = character.encode("gb2312", "ignore"), character.encode("big5", "ignore")
        if mainland and not taiwan:
            simplified.append(character)
        elif taiwan and not mainland and taiwan < b"\xc9":
            traditional.append(character)
    return re.compile(f"[{''.join(simplified)}]"), re.compile(f"[{''.join(traditional)}]")


def is_mojibake(text: str) -> bool:
    """Whether the text is UTF-8 that was read as GBK. The comma "，" and the stop "。" then begin with "锛" and "銆",
    which Chinese hardly ever uses; "锟斤拷" is what GBK makes of two U+FFFD."""
    found = text.count("锛") + text.count("銆") + 3 * text.count("锟斤拷")
    return found > 1 and 100 * found >= han(text)
