"""Chinese web text: furniture goes, text stays, and the two scripts are told apart."""

import gzip
import json
from pathlib import Path

import pytest

from data_pipelines.conversation import Conversation, DataError, Turn, Where
from data_pipelines.sources import zh_web
from data_pipelines.stages import chinese
from data_pipelines.stages.base import Dropped
from data_pipelines.stages.chunk import Ledger
from data_pipelines.stages.filter import Filter

ARTICLES = Path(__file__).parents[4] / "shared/data/eval/skywork/zh_general.jsonl.gz"
WHERE = Where("zh_web/a.jsonl", 3)

TEXT = (
    "近日，市文化馆举办了一场面向市民的书法展，展出作品一百二十余件。\n"
    "展览由三个部分组成，分别介绍楷书、行书与草书的源流。不少观众表示，这样的展览让他们重新认识了汉字之美。\n"
    "主办方介绍，展览将持续到下月底，周一闭馆，市民可以免费参观。"
)
TRADITIONAL = (
    "近日，市文化館舉辦了一場面向市民的書法展，展出作品一百二十餘件。\n"
    "展覽由三個部分組成，分別介紹楷書、行書與草書的源流。不少觀眾表示，這樣的展覽讓他們重新認識了漢字之美。"
)


def filtered(text, **options):
    """The text that stays, or the reason."""
    given = Conversation("s", "i", (Turn("text", text, 1.0),))
    try:
        return Filter({"languages": ("zh",), "chinese": options}).conversation(given, Ledger()).turns[0].text
    except Dropped as dropped:
        return dropped.reason


PAGES = {
    "boilerplate": (
        """首页 | 新闻中心 | 产品中心 | 关于我们 | 联系我们
登录 注册 忘记密码 免费注册 用户协议 隐私政策
加入收藏 设为首页 网站地图 友情链接 在线客服""",
        """用户名：
密码：
验证码： 换一换
记住我 忘记密码？ 立即登录 免费注册 手机版 客户端
微信登录 QQ登录 找回密码""",
        """版权所有 © 2015-2023 某某科技有限公司 保留所有权利
京ICP备12345678号-1 京公网安备11010802020088号
未经授权，任何人不得转载或复制本站内容。""",
        """上一篇：市文化馆举办书法展
下一篇：图书馆延长开放时间
相关阅读：展览的幕后故事
热门推荐：周末去哪儿玩
责任编辑：王小明 来源：本地日报""",
        """当前位置：首页 > 新闻 > 国内新闻 > 正文
发布时间：2023-09-01 08:00 浏览次数：1024
分享到：微信 微博 收藏 打印 关闭窗口
字号：大中小""",
        """本网站使用cookie来改善您的体验
接受全部cookie 管理cookie设置 查看隐私政策
点击查看更多 展开全文 返回顶部""",
        """查看: 5911|回复: 14
楼主| 发表于 2014-1-27 10:46:14 | 显示全部楼层
马上注册,结交更多好友,享用更多功能。
您需要 登录 才可以下载或查看,没有帐号?注册""",
        """首頁 登入 註冊 聯絡我們 關於我們
隱私權政策 網站地圖 首頁 登入 註冊""",
    ),
    "no_sentences": (
        """北京旅游攻略大全 北京旅游景点介绍 北京旅游路线推荐 北京旅游酒店预订
上海旅游攻略大全 上海旅游景点介绍 上海旅游路线推荐 上海旅游酒店预订""",
        "红木家具 实木家具 办公家具 酒店家具 餐厅家具 卧室家具 客厅家具 书房家具 儿童家具 户外家具 定制家具",
    ),
    "short_lines": (
        "\n".join(("书法", "展览", "楷书", "行书", "草书", "篆书", "隶书", "国画", "油画", "版画", "雕塑")),
    ),
    "not_chinese": (
        "产品型号 ABC-1234-XYZ-5678 电压 220V 50Hz 功率 1500W 2000W 2500W 尺寸 120x80x60mm 认证 CE RoHS FCC UL",
        "价格：1,299.00 1,399.00 1,499.00 1,599.00 1,699.00 1,799.00 1,899.00 1,999.00 2,099.00 2,199.00 元",
    ),
    "mojibake": (TEXT.encode().decode("gbk", "replace"), "锟斤拷锟斤拷锟斤拷，这是一个测试页面，锟斤拷锟斤拷。"),
    "spelled_out": ("國務(wù)院辦公廳印發(fā)《意見》，要求構(gòu)建優(yōu)質(zhì)均衡的公共教育服務(wù)體系。",),
}
BAD = [(reason, page) for reason, pages in PAGES.items() for page in pages]


@pytest.mark.parametrize(("reason", "page"), BAD, ids=[f"{reason}{i}" for i, (reason, _) in enumerate(BAD)])
def test_pages_without_text_go(reason, page):
    flaw = chinese.flaw(page, chinese.OPTIONS)
    assert flaw is not None and flaw[0] == reason and "expected" in flaw[1]


GOOD = (
    TEXT,
    "请点击右上角的“登录”按钮，输入用户名和密码，然后点击“注册”。如果忘记密码，请点击“忘记密码”找回。",
    "本文讨论版权所有权的归属问题。著作权法规定，作者享有署名权。未成年人的作品同样受保护。",
    "上一章我们介绍了函数，下一章将介绍类。首页的设计应当简洁，导航栏不宜超过七项。",
    "“轉(zhuǎn)”字怎么读？这个字有两个读音，放在不同的词里读法也不同，查字典就能知道。",
    "锛是一种木工工具，形状像斧，用来削平木料。《说文》里没有这个字，后来的字书才收录了它，读作奔。",
    "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
    "问：怎样学好数学？\n答：多想，多问，多练习。先理解概念，再做题目，遇到难题不要急着看答案，也不要轻易放弃。",
)


@pytest.mark.parametrize("text", GOOD)
def test_text_about_pages_stays(text):
    assert filtered(text, min_line_chars=5) == text


def test_furniture_around_a_text_goes_and_the_text_stays():
    before = "当前位置：首页 > 新闻\n来源：本地日报 责任编辑：王小明\n"
    after = "\n上一篇：图书馆延长开放时间\n登录 | 注册 | 设为首页 | 联系我们\n版权所有 © 2023 某某网 京ICP备123号"
    given = before + TEXT.replace("免费参观。", "免费参观。 详情点击>>") + after
    assert filtered(given, max_boilerplate=0.5) == TEXT
    assert filtered(given, max_boilerplate=0.5, drop_lines=False) == given
    assert filtered(given) == "boilerplate"
    ledger = Ledger()
    whole = Conversation("s", "i", (Turn("text", given, 1.0),))
    Filter({"chinese": {"max_boilerplate": 0.5}}).conversation(whole, ledger)
    assert ledger.changed == {"boilerplate_lines": 1}
    with pytest.raises(Dropped) as caught:
        Filter({"min_chars": 200, "chinese": {"max_boilerplate": 0.5}}).conversation(whole, Ledger())
    assert caught.value.reason == "too_short"  # without the furniture


def test_scripts():
    assert chinese.script(TEXT) == "simplified"
    assert chinese.script(TRADITIONAL) == "traditional"
    assert chinese.script(TEXT + TRADITIONAL) == "mixed"
    assert chinese.script("床前明月光") is None
    assert chinese.script("he wrote 12") is None
    assert filtered(TRADITIONAL) == TRADITIONAL
    assert filtered(TRADITIONAL, script="simplified") == "chinese_script"
    assert filtered(TEXT + TRADITIONAL, script="simplified") == "chinese_script"
    assert filtered(TEXT, script="traditional") == "chinese_script"
    assert filtered(TEXT, script="simplified") == TEXT


def test_source():
    row = {"text": TEXT, "title": "书法展", "url": "https://example.org", "date": "2023-09-01"}
    (conversation,) = zh_web.convert(row, WHERE)
    assert conversation == Conversation("zh_web", "zh_web/a:3", (Turn("text", TEXT, 1.0),))
    assert zh_web.convert({"text": TEXT}, WHERE) == [conversation]
    for row, reason in (({"content": TEXT}, "wrong_keys"), ({"text": 1}, "wrong_type"), ({"text": " "}, "empty_text")):
        with pytest.raises(DataError) as caught:
            zh_web.convert(row, WHERE)
        assert caught.value.reason == reason


@pytest.mark.real_data
@pytest.mark.skipif(not ARTICLES.is_file(), reason=f"{ARTICLES} is absent")
def test_articles_stay():
    articles = [json.loads(line)["text"] for line in gzip.decompress(ARTICLES.read_bytes()).decode().splitlines()]
    assert len(articles) == 240
    strict = {**chinese.OPTIONS, "script": "simplified"}
    assert [flaw for text in articles if (flaw := chinese.flaw(text, strict))] == []
    kept = [chinese.cleaned(text) for text in articles]
    assert sum(map(len, kept)) > 0.997 * sum(map(len, articles)) and "点击>>" not in "".join(kept)
    # the controls: the same texts spoilt
    spoilt = {
        "no_sentences": [text.translate(dict.fromkeys(map(ord, "，。！？；…!?"), " ")) for text in articles],
        "short_lines": ["\n".join(text[i : i + 6] for i in range(0, len(text), 6)) for text in articles],
        "mojibake": [text.encode().decode("gbk", "replace") for text in articles],
    }
    for reason, texts in spoilt.items():
        assert sum((chinese.flaw(text, strict) or [""])[0] == reason for text in texts) >= 238, reason
